"""A run that is stopped or killed goes on to the very same end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from eva_mim.cli import main
from eva_mim.core import run_folder as checkpoint
from tests.conftest import make_folder, picture, png
from tests.tiny import CLASSIFY, CLIP, MIM, command, environment, losses, records, run, write_recipe

pytestmark = pytest.mark.slow


def stop_at(step: int, number: signal.Signals, program: str, recipe: Path, out: Path, *overrides: str) -> int:
    """Start a stage with loader processes, signal all of them once it has logged `step`, return its exit code."""
    line = command(program, recipe, out, "data.workers=2", *overrides)
    process = subprocess.Popen(
        line, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        log = out / "metrics.jsonl"
        if log.exists() and log.read_text().count('"train"') >= step:
            os.killpg(process.pid, number)
            break
        time.sleep(0.005)
    return process.wait(120)


@pytest.mark.parametrize(
    ("program", "tree", "number"),
    [
        ("mim", MIM, signal.SIGKILL),
        ("mim", MIM, signal.SIGTERM),
        ("clip", CLIP, signal.SIGKILL),
        ("classify", CLASSIFY, signal.SIGUSR1),
    ],
)
def test_stopped_run_ends_bit_for_bit_like_an_undisturbed_one(
    tmp_path: Path, program: str, tree: dict[str, Any], number: signal.Signals
) -> None:
    """Weights and every logged loss are equal; drop path, masks and augmentation are on."""
    tree = tree | {"run": tree["run"] | {"epochs": 6, "checkpoint_every": 3}, "student": tree["student"] | {"drop_path": 0.1}}
    recipe = write_recipe(tmp_path, tree)
    run(program, recipe, tmp_path / "straight")
    code = stop_at(8, number, program, recipe, tmp_path / "stopped")
    assert code in ({-9} if number == signal.SIGKILL else {75})
    run(program, recipe, tmp_path / "stopped")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")
    assert [record["step"] for record in records(tmp_path / "stopped")] == list(range(1, 25))
    expected = load_file(tmp_path / "straight" / "model.safetensors")
    found = load_file(tmp_path / "stopped" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_ctrl_c_writes_a_checkpoint_and_says_so(tmp_path: Path) -> None:
    """Exit code 130, and the checkpoint is of the step that was ended."""
    recipe = write_recipe(tmp_path, MIM | {"run": MIM["run"] | {"epochs": 20}})
    assert stop_at(5, signal.SIGINT, "mim", recipe, tmp_path / "run") == 130
    found = checkpoint.latest(tmp_path / "run")
    assert found is not None
    assert found[0] == records(tmp_path / "run")[-1]["step"]


def test_half_written_checkpoint_is_not_believed(tmp_path: Path) -> None:
    """A file cut short, and a folder without manifest: the one before counts."""
    recipe = write_recipe(tmp_path, CLASSIFY)
    run("classify", recipe, tmp_path / "run")
    folders = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["step-00000004", "step-00000008"]
    with (folders[1] / "exp_avg.safetensors").open("rb+") as file:
        file.truncate(1000)
    found = checkpoint.latest(tmp_path / "run")
    assert found is not None
    assert found[1] == folders[0]
    (folders[0] / checkpoint.MANIFEST).unlink()
    assert checkpoint.latest(tmp_path / "run") is None


def test_finished_stage_is_not_run_again_and_other_settings_are_refused(tmp_path: Path) -> None:
    """The folder is left as it is in both cases."""
    recipe = write_recipe(tmp_path, CLASSIFY)
    run("classify", recipe, tmp_path / "run")
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
    newest = checkpoint.latest(tmp_path / "run")
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
    assert len(record["teacher"]["sha256"]) == 64
