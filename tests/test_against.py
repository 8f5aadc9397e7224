"""The comparison with other programs: its arithmetic, its clocks, its mistakes, and real runs in small."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import pytest
import torch

from eva_mim.core.errors import UserError
from eva_mim.optim.optimizers import SkippableAdamW
from tests.test_tools import says
from tests.tiny import python, started
from tools.against import probe
from tools.against.figures import Run, ratios, table
from tools.against.pictures import write_folders
from tools.against.probe import Clocks, Probe, tree_seconds
from tools.against.runs import Job, Side, alternate, measured

BURN = """
import subprocess, sys, time
while time.process_time() < float(sys.argv[1]):
    pass
below = float(subprocess.run([sys.executable, *sys.argv[2:]], stdout=subprocess.PIPE).stdout) if len(sys.argv) > 2 else 0
print(time.process_time() + below, flush=True)
if below:
    sys.stdin.read()
"""
"""Burns processor seconds, then runs a program that does so too, and says the sum; it stays until its input is closed."""
TRAINING = """
import torch
weight = torch.nn.Parameter(torch.zeros(3, 5))
optimizer = torch.optim.AdamW([{"params": [weight]}, {"params": [torch.nn.Parameter(torch.zeros(7))]}])
for _ in range(STEPS):
    weight.sum().backward()
    optimizer.step()
open("left.txt", "w").write("by a program that ended by itself")
"""


def test_ratios_and_table() -> None:
    """Worked out by hand: medians over runs, ours / theirs."""
    theirs = [Run(10.0, 4.0, 0.01, 2_500_000), Run(8.0, 6.0, 0.3, 2_500_000), Run(9.0, 5.0, 0.02, 2_500_000)]
    ours = [Run(18.0, 2.0, 0.0, 2_490_000), Run(17.0, 3.0, 0.0, 2_490_000), Run(20.0, 2.5, 0.11, 2_490_000)]
    assert ratios(ours, theirs) == {"images_per_s": 2.0, "cpu_seconds": 0.5}
    lines = table("a title", {"ours": ours, "theirs": theirs}, "theirs").splitlines()
    assert lines[0] == "a title"
    assert [line.split() for line in lines[3:5]] == [
        ["ours", "18", "(17-20)", "2.5", "(2-3)", "2.49M", "0.11"], ["theirs", "9", "(8-10)", "5", "(4-6)", "2.50M", "0.30"],
    ]
    assert lines[5:] == ["ours / theirs: 2.000 in images/s, 0.500 in cpu-s a step"]
    assert {len(line) for line in lines[2:5]} == {80}


def test_processor_seconds_of_a_tree() -> None:
    """Of a process that lives and its child that has ended; then of both after they have ended. A clock's step is 10 ms, and a
    process has two clocks."""
    burn = ["-c", BURN]
    before, began = tree_seconds(psutil.Process()), time.process_time()
    with subprocess.Popen(
        [sys.executable, *burn, "0.3", *burn, "0.4"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        used = float(process.stdout.readline())
        living = tree_seconds(psutil.Process(process.pid))
        with_us, own = tree_seconds(psutil.Process()) - before, time.process_time() - began
    ended = tree_seconds(psutil.Process()) - before
    assert used >= 0.7
    assert living == pytest.approx(used, abs=0.1)
    assert with_us == pytest.approx(used + own, abs=0.15)
    assert with_us <= ended < used + own + 0.3


@pytest.mark.parametrize("kind", [SkippableAdamW, torch.optim.AdamW])
def test_a_step_is_measured_between_two_steps_of_the_optimizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    """Two steps of warm-up, four measured ones of 8 images: 16 s by wall, 24 of the processor, and 4 by others. torch calls the
    hook once for a step of our optimizer, which calls that of torch's."""
    readings = [Clocks(100.0, 7.0, 1000.0), Clocks(116.0, 31.0, 1028.0)]
    monkeypatch.setattr(probe, "read_clocks", lambda: readings.pop(0))
    weight = torch.nn.Parameter(torch.zeros(3))
    torch.optim.AdamW([weight])  # from now on torch's step calls hooks itself
    optimizer = kind([{"params": [weight]}])
    hook = Probe(tmp_path / "report.json", 2, 4, 8)
    optimizer.register_step_post_hook(hook)
    weight.grad = torch.ones(3)
    for _ in range(5):
        optimizer.step()
    assert hook.done == 5
    assert len(readings) == 1
    with pytest.raises(SystemExit):
        optimizer.step()
    assert json.loads((tmp_path / "report.json").read_text()) == {
        "images_per_s": 2.0, "cpu_seconds": 6.0, "others": 0.25, "parameters": 3
    }


@pytest.mark.long
def test_runs_alternate_and_leave_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A program of somebody else is measured, and ended after the last measured step; what it wrote is removed."""
    (tmp_path / "train.py").write_text(TRAINING.replace("STEPS", "10**9"))
    program = [str(tmp_path / "train.py")]
    job = Job("", [Side("a", program), Side("c", program)], Side("b", program))
    runs = alternate(job, tmp_path, rounds=2, steps=500, batch=8)
    said = [line.split(":")[0] for line in capfd.readouterr().err.splitlines()]
    assert said == [f"round {number} of 2, {name}" for number in (1, 2) for name in "abc"]
    assert [len(found) for found in runs.values()] == [2, 2, 2]
    assert all(run.parameters == 22 and run.images_per_s > 8 and run.cpu_seconds < 1 for run in runs["b"])
    assert [path.name for path in tmp_path.iterdir()] == ["train.py"]


@pytest.mark.slow
def test_a_program_that_fails_or_ends_early(tmp_path: Path) -> None:
    file = tmp_path / "train.py"
    file.write_text(TRAINING.replace("STEPS", "5"))
    with pytest.raises(UserError, match=r"^theirs ended before step 6$"):
        measured(Side("theirs", [str(file)]), tmp_path, 4, 8)
    file.write_text("raise ValueError('no such shard')")
    with pytest.raises(UserError, match=r"^theirs ended with exit code 1: ValueError: no such shard$"):
        measured(Side("theirs", [str(file)]), tmp_path, 4, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["train.py"]


@pytest.mark.slow
def test_mistakes(tmp_path: Path) -> None:
    """One line each, before anything is made."""
    for words, text in (
        (["classify", "--timm", tmp_path], f"--timm: {tmp_path}/train.py is not there; it is a file of"),
        (["classify", "--timm", tmp_path / "train.py"], f"--timm: {tmp_path}/train.py is not there"),
        (["mim", "--original", tmp_path], f"--original: {tmp_path} has no run_eva_pretraining.py; give EVA-01/eva"),
    ):
        said = says("against", *words, code=2)
        assert said.startswith(f"error: {text}")
        assert said.count("\n") == 1


@pytest.mark.parametrize("missing", [True, False])
def test_models_and_packages_of_open_clip(missing: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tools.against import __main__ as tool
    from tools.against import jobs

    monkeypatch.setattr(jobs, "find_spec", lambda name: None if missing and name == "webdataset" else object())
    unknown = {"ViT-X-1": "open_clip has no 'ViT-X-1'", "ViT-S-32": "timm has no image tower of the sizes of ViT-S-32"}
    for model, text in unknown.items():
        text = "open_clip_train needs webdataset, which are not installed" if missing else text
        with pytest.raises(UserError, match=text):
            jobs.clip(tool.parser().parse_args(["clip", "--model", model]), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_pictures_of_a_folder(tmp_path: Path) -> None:
    count = write_folders(tmp_path, 70)
    classes = {path.name for path in (tmp_path / "train").iterdir()}
    assert count == len(classes) == 6
    assert {path.parent.name for path in tmp_path.glob("val/*/*.jpg")} == classes
    assert len(list(tmp_path.glob("train/*/*.jpg"))) == 70
    assert len({path.read_bytes() for path in tmp_path.glob("train/*/*.jpg")}) == 64


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(not find_spec("webdataset"), reason="open_clip_torch[training] is not installed")
def test_a_small_model_against_open_clip_train(tmp_path: Path) -> None:
    words = ["--model", "ViT-M-32-alt", "--batch", "2", "--steps", "1", "--rounds", "1", "--precision", "fp32"]
    with TemporaryDirectory() as short:  # loader processes have sockets there, whose paths may not be long
        done = started(python("tools.against", "clip", *words, "--to", tmp_path / "figures.json"), TMPDIR=short)
        assert [path.name for path in Path(short).iterdir() if not path.name.startswith("torchinductor")] == []
    found = json.loads((tmp_path / "figures.json").read_text())
    ours, theirs = (found["runs"][name] for name in ("eva-mim", "open_clip_train"))
    assert ours[0]["parameters"] == theirs[0]["parameters"]
    assert all(run[0]["images_per_s"] > 0 and run[0]["cpu_seconds"] > 0 for run in (ours, theirs))
    speed = ours[0]["images_per_s"] / theirs[0]["images_per_s"]
    assert found["ratios"]["eva-mim"]["images_per_s"] == pytest.approx(speed)
    assert f"eva-mim / open_clip_train: {speed:.3f} in images/s" in done.stdout
