"""`eva-mim bench step` and `bench compare`: operations against another count, sentences, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from eva_mim.cli import main
from eva_mim.commands.step_speed import Products, StepSpeed, compare
from tests.targets.test_groups import recipe as groups
from tests.tiny import CLASSIFY, MIM, finish, python, write_recipe

MEASURED: dict[str, Any] = {
    "recipe": "r.yaml", "program": "mim", "overrides": [], "device": "cpu", "processes": 1, "threads": 2, "precision": "fp32",
    "slowdown": 1.0, "workers": 2, "batch": 100, "micro_batch": 50, "steps": 5, "seconds": 2.0, "peak_memory": 10**9,
    "logging": 0.01,
    "phases": {"data": 0.1, "teacher": 0.4, "student": 0.5, "backward": 0.8, "optimizer": 0.1, "rest": 0.1},
    "gflop": 100.0, "products": 1.0, "forward": {},
}


def speed(**changes: Any) -> StepSpeed:
    return StepSpeed.model_validate(MEASURED | changes)


@pytest.mark.parametrize(("changes", "said"), [
    ({"slowdown": 52.0, "precision": "bf16"}, "run.precision=bf16 is emulated here, 52 times as slow as fp32: set"),
    ({"phases": {"data": 0.5, "student": 1.5}}, "25% of the step waits for data: more loader processes than data.workers=2"),
    ({"phases": {"teacher clip": 0.5, "teacher dino": 0.5}}, "50% of the step is the teacher's forward pass"),
    ({"communication": 1.0, "processes": 2}, "its collectives take as long as 50% of the step"),
    ({"products": 1.5, "bf16": 0.5}, "75% of the step are matrix products in fp32, and in bf16 they are 2.0 times as fast here"),
    ({"products": 1.5}, "75% of the step are matrix products at this machine's own rate for them (67 GFLOP/s)"),
    ({}, "50% of the step are matrix products; the rest is work between them"),
])
def test_one_sentence(changes: dict[str, Any], said: str) -> None:
    assert said in speed(**changes).verdict


def test_two_side_by_side() -> None:
    """Milliseconds an image, also of steps of different sizes; what differs in the settings is named."""
    faster = speed(batch=200, seconds=2.0, phases=MEASURED["phases"] | {"teacher": 0.2}, overrides=["a=b"])
    lines = compare(speed(), faster).splitlines()
    assert lines[1].split() == ["images/s", "50", "100", "2.00x"]
    assert next(line for line in lines if line.startswith("teacher")).split()[-3:] == ["4", "1", "4.00x"]
    assert lines[-2:] == ["overrides: [] -> ['a=b']", "batch: 100 -> 200"]


def test_operations_are_those_that_torch_counts() -> None:
    """Forward and backward, without attention."""
    network, images = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64), torch.randn(3, 3, 64, 64)
    with FlopCounterMode(display=False) as counter:
        network(images).sum().backward()
    wanted = sum(count for name, count in counter.get_flop_counts()["Global"].items() if "attention" not in str(name))
    with Products() as products:
        network(images).sum().backward()
    assert products.operations == wanted > 0
    assert products.seconds_alone(torch.device("cpu")) > 0


def test_a_step_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Phases make up the step; a JSON file that `compare` reads."""
    recipe, out = write_recipe(tmp_path / "mim", MIM), tmp_path / "a.json"
    assert main(["bench", "step", str(recipe), "--steps", "2", "--to", str(out), "optim.lr=0.001"]) == 0
    text = capsys.readouterr().out
    found = StepSpeed.model_validate_json(out.read_text())
    assert set(found.phases) == {"data", "teacher", "student", "backward", "optimizer", "rest"}
    assert sum(found.phases.values()) == pytest.approx(found.seconds)
    assert found.overrides == ["optim.lr=0.001"]
    assert set(found.forward) == {"the student", "the teacher"}
    assert found.verdict.split()[0] in text
    assert max(map(len, text.splitlines())) <= 80
    assert main(["bench", "compare", str(out), str(out)]) == 0
    assert "1.00x" in capsys.readouterr().out


@pytest.mark.slow
def test_of_two_processes(tmp_path: Path) -> None:
    """The main one is measured; the collectives of a step have a line of their own."""
    recipe, out = write_recipe(tmp_path / "mim", MIM), tmp_path / "a.json"
    line = ["eva_mim.cli", "bench", "step", str(recipe), "run.engine=deepspeed", "--to", str(out)]
    finish(python(*line, processes=2))
    found = StepSpeed.model_validate_json(out.read_text())
    assert (found.processes, found.batch) == (2, 24)
    assert 0 < found.communication < 2 * found.seconds
    assert "collectives, beside it" in found.report()


def test_what_cannot_be_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere = write_recipe(tmp_path / "mine", CLASSIFY)
    assert main(["bench", "step", str(elsewhere)]) == 2
    assert "does not lie in a folder of its program's name; add --program mim|clip|classify|probe" in capsys.readouterr().err
    assert main(["bench", "step", str(elsewhere), "--to", str(tmp_path / "no" / "x.json")]) == 2
    assert f"{tmp_path / 'no'} is not a folder" in capsys.readouterr().err
    (tmp_path / "bad.json").write_text(json.dumps({"phases": 1}))
    for file in (tmp_path / "bad.json", tmp_path / "none.json"):
        assert main(["bench", "compare", str(file), str(file)]) == 2
        assert f"{file} is no file of `eva-mim bench step --to`" in capsys.readouterr().err


@pytest.mark.long
def test_a_run_is_saved_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The size is that of weights and two moments; nothing is left of it; a run that ends too early is told."""
    recipe, out = write_recipe(tmp_path / "classify", CLASSIFY), tmp_path / "resume.json"
    (tmp_path / "disk").mkdir()
    line = ["bench", "resume", str(recipe), "--disk", str(tmp_path / "disk"), "--to", str(out)]
    assert main([*line, "run.epochs=100"]) == 0
    assert "training held for" in capsys.readouterr().out
    found = json.loads(out.read_text())
    weights = sum(p.numel() for p in timm.create_model("vit_nano_patch4_32", patch_size=8, num_classes=6).parameters())
    assert found["bytes_saved"] == pytest.approx(12 * weights, rel=0.02)
    assert 0 < found["step"] < found["first_step"]
    assert not any((tmp_path / "disk").iterdir())
    assert main([*line, "run.epochs=1"]) == 2
    assert "the run ends after 4 steps, and more than 7 are measured; raise run.epochs" in capsys.readouterr().err
    assert main([*line, "run.epochs=x"]) == 2
    assert "the run ended with exit code 2:" in capsys.readouterr().err
    assert not any((tmp_path / "disk").iterdir())


def test_places_that_do_not_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path / "classify", CLASSIFY)
    assert main(["bench", "resume", str(recipe), "--disk", str(tmp_path / "no")]) == 2
    assert f"--disk: {tmp_path / 'no'} is not a folder" in capsys.readouterr().err


@pytest.mark.slow
def test_a_group_of_another_size_than_the_student_s_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The forward passes are those of the group's own teachers, on what they see in it."""
    words = ["groups.near.image_size=64", "teachers.low.interpolate=student", "teacher_drop=0"]
    out = tmp_path / "step.json"
    assert main(["bench", "step", str(groups(tmp_path)), "--program", "mim", "--steps", "1", "--to", str(out), *words]) == 0
    found = StepSpeed.model_validate_json(out.read_text())
    assert set(found.forward) == {"the student", "teacher both", "teacher low"}
