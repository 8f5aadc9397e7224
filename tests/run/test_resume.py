"""A run that is stopped or killed goes on to the very same end."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from eva_mim.cli import main
from eva_mim.core.log import say
from eva_mim.core.run_folder import MANIFEST, RunFolder
from eva_mim.run.signals import caught_signals
from tests.conftest import make_folder, picture, png
from tests.ranks import Launched, ends
from tests.tiny import (
    CLASSIFY,
    CLIP,
    MIM,
    MODULES,
    losses,
    records,
    run,
    run_until,
    same_weights,
    stopped_after,
    write_recipe,
)

pytestmark = pytest.mark.slow


def stop_at(step: int, number: signal.Signals, program: str, recipe: Path, out: Path, *overrides: str) -> int:
    """Start a stage with loader processes, signal all of them once it has logged `step`, return its exit code."""
    process = Launched(ends, MODULES[program], [str(recipe), "data.workers=2", *overrides, "--out", str(out)])
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        log = out / "metrics.jsonl"
        if log.exists() and log.read_text().count('"train"') >= step:
            os.killpg(process.pid, number)
            break
        time.sleep(0.005)
    return process.wait(120)


def going_on_matters(tree: dict[str, Any]) -> dict[str, Any]:
    """24 steps in 6 epochs, with drop path."""
    return tree | {"run": tree["run"] | {"epochs": 6, "checkpoint_every": 3}, "student": tree["student"] | {"drop_path": 0.1}}


def same_end(found: Path, straight: Path) -> None:
    """Weights and every logged loss are equal, and each step is logged once."""
    assert losses(found) == losses(straight)
    assert [record["step"] for record in records(found)] == list(range(1, len(losses(straight)) + 1))
    same_weights(found / "model.safetensors", straight / "model.safetensors")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a masked run that nobody stopped, and its recipe."""
    folder = tmp_path_factory.mktemp("straight")
    run("mim", write_recipe(folder, going_on_matters(MIM)), folder / "run")
    return folder


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 75)])
def test_stopped_run_ends_bit_for_bit_like_an_undisturbed_one(
    tmp_path: Path, straight: Path, number: signal.Signals, code: int
) -> None:
    """Two real programs with loader processes: drop path, masks and augmentation are on."""
    assert stop_at(8, number, "mim", straight / "recipe.yaml", tmp_path / "stopped") == code
    run("mim", straight / "recipe.yaml", tmp_path / "stopped")
    same_end(tmp_path / "stopped", straight / "run")


@pytest.mark.parametrize(("program", "tree", "number"), [("clip", CLIP, "SIGUSR2"), ("classify", CLASSIFY, "SIGUSR1")])
def test_other_programs_end_bit_for_bit_after_a_stop_and_after_a_kill(
    tmp_path: Path, program: str, tree: dict[str, Any], number: str
) -> None:
    """A signal in step 2 of 6, and the folder as a kill after step 5 leaves it."""
    tree = going_on_matters(tree)
    tree["run"] |= {"epochs": None, "samples": 144, "checkpoint_every": 1, "keep_last": 9}
    recipe, straight = write_recipe(tmp_path, tree), tmp_path / "straight"
    run(program, recipe, straight)
    run_until(2, program, recipe, tmp_path / "stopped", by=number)
    for out, step in ((tmp_path / "stopped", 2), (stopped_after(5, straight, tmp_path / "killed"), 5)):
        assert f"going on from step {step}" in run(program, recipe, out).stderr
        same_end(out, straight)


def test_ctrl_c_writes_a_checkpoint_and_says_so(tmp_path: Path) -> None:
    """Exit code 130, and the checkpoint is of the step that was ended."""
    recipe = write_recipe(tmp_path, CLASSIFY | {"run": CLASSIFY["run"] | {"epochs": 200}})
    assert stop_at(5, signal.SIGINT, "classify", recipe, tmp_path / "run") == 130
    found = RunFolder(tmp_path / "run").latest()
    assert found is not None
    assert found[0] == records(tmp_path / "run")[-1]["step"]


def test_a_signal_may_come_while_a_line_is_printed(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Python refuses a second write inside the first, which ended runs without a checkpoint."""

    class Raw(io.RawIOBase):
        signals = 0

        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            if not self.signals:
                self.signals = 1
                os.kill(os.getpid(), signal.SIGTERM)
            return os.write(2, data)

    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BufferedWriter(Raw()), write_through=True))
    with caught_signals() as caught:
        say("step 7")
    assert caught == [signal.SIGTERM]
    assert capfd.readouterr().err == "  SIGTERM: ending this step, then writing a checkpoint\nstep 7\n"


@pytest.fixture(scope="module")
def classified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a classifier's run, to be copied, and its recipe."""
    folder = tmp_path_factory.mktemp("classified")
    run("classify", write_recipe(folder, CLASSIFY), folder / "run")
    return folder


def test_half_written_checkpoint_is_not_believed(tmp_path: Path, classified: Path) -> None:
    """A file cut short, and a folder without manifest: the one before counts."""
    shutil.copytree(classified / "run", tmp_path / "run")
    folders = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["step-00000004", "step-00000008"]
    with (folders[1] / "exp_avg.safetensors").open("rb+") as file:
        file.truncate(1000)
    found = RunFolder(tmp_path / "run").latest()
    assert found is not None
    assert found[1] == folders[0]
    (folders[0] / MANIFEST).unlink()
    assert RunFolder(tmp_path / "run").latest() is None


def test_finished_stage_is_not_run_again_and_other_settings_are_refused(tmp_path: Path, classified: Path) -> None:
    """The folder is left as it is in both cases."""
    recipe = classified / "recipe.yaml"
    shutil.copytree(classified / "run", tmp_path / "run")
    before = (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns
    again = run("classify", recipe, tmp_path / "run")
    assert "finished before" in again.stderr
    other = run("classify", recipe, tmp_path / "run", "optim.lr=0.5", code=2)
    assert "optim.lr: 0.002 -> 0.5" in other.stderr
    assert "Traceback" not in other.stderr
    assert (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns == before


def test_a_run_does_not_go_on_with_other_images(tmp_path: Path) -> None:
    """One more image is another order of all. A list of broken ones that comes in mid-run changes nothing."""
    root = make_folder(tmp_path / "data", {"ant": 40, "bee": 40}, size=(32, 32))
    recipe = write_recipe(tmp_path, CLASSIFY | {
        "data": {"source": "folder", "root": str(root), "val_share": 0.2}, "run": CLASSIFY["run"] | {"epochs": 200},
    })
    assert stop_at(4, signal.SIGTERM, "classify", recipe, tmp_path / "run") == 75
    (root / "ant" / "new.png").write_bytes(png(picture(99, (32, 32))))
    refused = run("classify", recipe, tmp_path / "run", code=2)
    assert "begun with 64 training and 16 held-out images; since then the data has changed (now 65 " in refused.stderr
    newest = RunFolder(tmp_path / "run").latest()
    assert newest is not None
    assert f"init_from={newest[1]}" in refused.stderr
    (root / "ant" / "new.png").unlink()
    record = tmp_path / "run" / "lineage.json"
    record.write_text(record.read_text().replace(f'"torch": "{torch.__version__}"', '"torch": "1.0"'))
    assert main(["data", "verify", str(root), "--out", str(tmp_path / "list.json")]) == 0
    listed = f"data.quarantine={tmp_path / 'list.json'}"
    assert stop_at(int(newest[0]) + 4, signal.SIGTERM, "classify", recipe, tmp_path / "run", listed) == 75
    assert json.loads(record.read_text())["versions"]["torch"] == torch.__version__


def test_teacher_is_in_no_checkpoint(tmp_path: Path) -> None:
    """What a run saves is the student: as many weights, under its names."""
    run("mim", write_recipe(tmp_path, MIM), tmp_path / "run")
    record = json.loads((tmp_path / "run" / "lineage.json").read_text())
    state = load_file(tmp_path / "run" / "checkpoints" / "step-00000008" / "module.safetensors")
    trunk = load_file(tmp_path / "run" / "model.safetensors")
    head = load_file(tmp_path / "run" / "head.safetensors")
    assert state.keys() == {f"trunk.{name}" for name in trunk} | head.keys()
    assert head.keys() == {"mask_token", "head.weight", "head.bias"}
    assert len(record["teachers"]["teacher"]["sha256"]) == 64
