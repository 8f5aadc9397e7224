"""A part of each kind is one file (`tests/toys.py` holds them all) and one line in a table: here each line, and a run with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from eva_mim import cli
from eva_mim.convert import targets
from eva_mim.convert.targets import Format
from eva_mim.core import registry
from eva_mim.core.files import sha256
from eva_mim.core.registry import Command
from tests.tiny import CLASSIFY, MIM, losses, records, write_recipe

pytestmark = pytest.mark.slow
TEACHES: dict[str, Any] = MIM | {
    "teacher": {"kind": "colours", "name": "mean", "image_size": 16}, "objective": {"kind": "absolute"},
    "student": MIM["student"] | {"head": "wide"},
}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines that register the toys."""
    monkeypatch.setitem(registry.TEACHERS, "colours", "tests.toys:ColourTeacher")
    monkeypatch.setitem(registry.HEADS, "wide", "tests.toys:wide_head")
    monkeypatch.setitem(registry.OBJECTIVES, "absolute", "tests.toys:absolute")
    monkeypatch.setitem(registry.PROGRAMS, "brightness", Command("tests.toys:STAGE", "how bright an image is"))
    monkeypatch.setitem(cli.COMMANDS, "hash", Command("tests.toys", "hash a file"))
    counted = Format("counted", "weights and their number", "tests.toys:write_counted", lambda model, dst: f"count({dst})",
                     "tests.toys:run_counted")  # fmt: skip
    monkeypatch.setitem(targets.FORMATS, "counted", counted)


def test_a_teacher_a_head_and_an_objective_train_together(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert cli.main(["mim", str(write_recipe(tmp_path, TEACHES)), "--out", str(out)]) == 0
    head = load_file(out / "head.safetensors")
    assert [tuple(head[f"head.{layer}.weight"].shape) for layer in (0, 2)] == [(192, 96), (3, 192)]
    found = losses(out)
    assert 0 < found[-1] < found[0] < 1  # colours lie between 0 and 1: so do their mean absolute errors
    assert all(0 < record["largest"] <= 1 for record in records(out))
    assert json.loads((out / "lineage.json").read_text())["teachers"]["teacher"]["network"] == "colours"


def test_a_stage_trains_resumes_and_stands_in_a_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, CLASSIFY)
    plan = write_recipe(tmp_path, {"stages": [
        {"name": "bright", "program": "brightness", "recipe": str(recipe), "settings": {"optim.lr": 2e-4}},
        {"name": "labels", "program": "classify", "recipe": str(recipe), "init_from": "bright", "settings": {"run.epochs": 1}},
    ]}, "pipeline.yaml")  # fmt: skip
    out = tmp_path / "out"
    assert cli.main(["pipeline", str(plan), "--out", str(out)]) == 0
    assert losses(out / "bright")[-1] < losses(out / "bright")[0]
    first = load_file(out / "bright" / "model.safetensors")
    seeded = json.loads((out / "labels" / "lineage.json").read_text())["seeded"]
    assert len(seeded["loaded"]) == len(first)
    capsys.readouterr()
    assert cli.main(["pipeline", str(plan), "--out", str(out)]) == 0
    assert capsys.readouterr().err.count("nothing to do") == 2
    assert cli.main(["hash", str(out / "bright" / "model.safetensors")]) == 0
    assert capsys.readouterr().out.strip() == sha256(out / "bright" / "model.safetensors")


def test_a_format_is_written_with_its_proof(tmp_path: Path) -> None:
    from tests.convert.hostile import timm_folder

    source = timm_folder(tmp_path / "source")
    assert cli.main(["convert", "--to", "counted", "--", str(source), str(tmp_path / "result")]) == 0
    weights = load_file(source / "model.safetensors")
    assert json.loads((tmp_path / "result" / "count.json").read_text()) == len(weights)
    assert all(torch.equal(value, weights[name]) for name, value in load_file(tmp_path / "result" / "model.safetensors").items())
    (proof,) = tmp_path.rglob("*convert.json")
    assert json.loads(proof.read_text())["parity"]
