"""`eva-mim inspect`: what it prints about checkpoints that are known here to the last digit."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from eva_mim.cli import main
from eva_mim.core.files import sha256, write_json, write_weights
from tests.conftest import REPOSITORY


def stage(out: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """The folder of a finished stage, written by the functions that write it in a run."""
    import timm

    from eva_mim.trunks import TrunkSettings
    from eva_mim.trunks import small as small
    from eva_mim.weights.export import write_timm

    torch.manual_seed(0)
    trunk = timm.create_model("vit_nano_patch4_32", num_classes=0)
    weights = {name: value.detach() for name, value in trunk.state_dict().items()}
    out.mkdir()
    write_timm(out, trunk, TrunkSettings(name="vit_nano_patch4_32"), weights)
    write_weights(out / "head.safetensors", {"lm_head.weight": torch.zeros(2, 2)})
    write_json(out / "lineage.json", {
        "program": "mim", "finished": True, "steps": 500, "headline": "cosine", "metrics": {"cosine": 0.684777},
        "settings": {"student": {"name": "vit_nano_patch4_32"}}, "weights_sha256": sha256(out / "model.safetensors"),
        "parents": {"teacher.name": {"path": "runs/clip", "sha256": "e2ec93b1bb688e44"}},
    } | changes)
    return weights


def described(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    assert main(["inspect", *arguments, "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_stage_of_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = stage(tmp_path / "mim")
    before = sorted(tmp_path.rglob("*"))
    found = described(capsys, str(tmp_path / "mim"), "--values")
    assert found["parameters"] == sum(value.numel() for value in weights.values())
    assert (found["tensors"], found["bytes"]) == (len(weights), 4 * found["parameters"])
    assert found["dtypes"] == {"float32": len(weights)}
    assert found["stage"] == {"program": "mim", "finished": True, "steps": 500, "headline": "cosine", "figure": 0.684777}
    assert found["parents"] == {"teacher.name": {"path": "runs/clip", "sha256": "e2ec93b1bb688e44"}}
    assert (found["architecture"], found["image_size"]) == ("vit_nano_patch4_32", 32)
    assert (found["container"], found["containers"]) == ("model", ["head", "model"])
    assert {name: found["family"][name] for name in ("width", "depth", "patch")} == {"width": 96, "depth": 4, "patch": [4, 4]}
    assert found["values"] == {"nan": 0, "inf": 0, "tensors": [], "as_recorded": True}
    assert sorted(tmp_path.rglob("*")) == before


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = stage(tmp_path / "mim", finished=False)
    write_weights(tmp_path / "mim" / "model.safetensors", weights | {"norm.bias": weights["norm.bias"] + torch.nan})
    assert main(["inspect", str(tmp_path / "mim"), "--values"]) == 0
    rows = {line[:14].strip(): line[15:] for line in capsys.readouterr().out.splitlines()}
    assert rows["container"] == "model  (also there: head)"
    assert rows["stage"] == "mim, NOT finished, cosine 0.6848"
    assert rows["parents"] == "teacher.name = runs/clip (e2ec93b1bb68)"
    assert rows["parameters"] == f"0.46 M in {len(weights)} tensors"
    assert rows["values"] == "96 NaN and 0 infinite in norm.bias"
    assert rows["sha256"] == "NOT as recorded in lineage.json"
    assert rows["image size"] == "32 px"
    stage(tmp_path / "good")
    assert main(["inspect", str(tmp_path / "good"), "--values"]) == 0
    rows = {line[:14].strip(): line[15:] for line in capsys.readouterr().out.splitlines()}
    assert (rows["values"], rows["sha256"]) == ("all finite", "as recorded")


def test_a_foreign_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {"w": torch.tensor([1.0, torch.inf, torch.nan, torch.nan]), "n": torch.ones(3, dtype=torch.float16)}
    args = argparse.Namespace(model="eva_g_patch14", input_size=224)
    torch.save({"model": tensors, "model_ema": tensors, "args": args, "epoch": 7}, tmp_path / "a.pth")
    found = described(capsys, str(tmp_path / "a.pth"), "--values")
    assert (found["kind"], found["container"], found["containers"]) == ("torch", "model", ["model", "model_ema"])
    assert (found["architecture"], found["image_size"], found["facts"]["epoch"]) == ("eva_g_patch14", 224, 7)
    assert found["dtypes"] == {"float32": 1, "float16": 1}
    assert found["values"] == {"nan": 2, "inf": 1, "tensors": ["w"], "as_recorded": None}
    assert found["family"] is None
    assert "checkpoint" in found["family_unknown"]
    assert found["stage"] is None
    assert found["parents"] == {}
    assert described(capsys, str(tmp_path / "a.pth"), "--container", "model_ema")["container"] == "model_ema"


@pytest.mark.parametrize("record", [[], {"program": 3, "parents": ["x"]}, {"program": "mim", "parents": {"a": 1}, "metrics": 3}])
def test_a_strange_record(tmp_path: Path, capsys: pytest.CaptureFixture[str], record: Any) -> None:
    write_weights(tmp_path / "model.safetensors", {"a": torch.zeros(2)})
    write_json(tmp_path / "lineage.json", record)
    write_json(tmp_path / "config.json", {"architecture": "x\x1b[2Jy", "pretrained_cfg": {"input_size": [3]}})
    assert main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "architecture   x?[2Jy\n" in out
    assert "\x1b" not in out
    described(capsys, str(tmp_path))


def test_a_damaged_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_weights(tmp_path / "model.safetensors", {"a": torch.zeros(20)})
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-10])
    assert main(["inspect", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert "truncated" in said.err


def test_no_torch_is_loaded(tmp_path: Path) -> None:
    """So it takes a fraction of a second, and nothing of the file can run."""
    torch.save({"model": {"a": torch.zeros(2)}}, tmp_path / "a.pt")
    code = "import sys\nfrom eva_mim.cli import main\ncode = main(['inspect', sys.argv[1]])\nassert 'torch' not in sys.modules\n"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.pt")], cwd=REPOSITORY, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr[-500:]
    assert "0.00 M in 1 tensors" in done.stdout
