"""The video stage: real runs that are killed, shared among processes, handed over, and measured again by strangers."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

import eva_mim.trunks.small  # noqa: F401
from eva_mim.core.settings import parse
from eva_mim.data import DataSettings
from eva_mim.data.splits import open_splits
from tests.data.test_videos import contents, encoded
from tests.tiny import CLASSIFY, VIDEO, environment, losses, masked_stage, run, run_until, same_weights, write_recipe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"), VIDEO)


@pytest.fixture(scope="module")
def out(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished stage that began from a masked one, with mixup and stochastic depth."""
    home = tmp_path_factory.mktemp("video")
    masked_stage(home)
    run("video", recipe, home / "out", *words(home))
    return home / "out"


def words(home: Path) -> list[str]:
    return [f"init_from={home / 'mim'}", "student.drop_path=0.1", "mix.mixup=0.2", "mix.cutmix=0.2"]


def lineage(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "lineage.json").read_text())
    return found


def test_figures_are_those_of_the_exported_program(out: Path) -> None:
    record = lineage(out)
    assert record["classes"] == ["left", "right", "up", "down"]
    assert record["seeded"]["reasons"]["time_embed"] == "zero: the parent has no positions of frames"
    assert len(losses(out)) == 8
    about, program = json.loads((out / "video.json").read_text()), torch.export.load(out / "program.pt2").module()
    shown = runpy.run_path(str(out / "classify_video.py"))["shown"]
    source, right = open_splits(parse(DataSettings, VIDEO["data"], "data")).val, 0
    for index in range(len(source)):
        sample = source.read(index)
        video: Any = sample.image
        frames = video.frames([int((part + 0.5) * len(video) / about["frames"]) for part in range(about["frames"])])
        with torch.inference_mode():
            right += int(program(shown(frames, about["image_size"])[None]).argmax()) == sample.label
    assert record["metrics"]["top1"] == pytest.approx(100 * right / len(source), abs=1e-4)


def test_the_script_in_the_folder(out: Path, tmp_path: Path) -> None:
    (tmp_path / "video.mp4").write_bytes(encoded(20))
    done = subprocess.run([sys.executable, out / "classify_video.py", tmp_path / "video.mp4"], env=environment(), cwd=tmp_path,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert {line.split()[-1] for line in lines} == {"left", "right", "up", "down"}
    assert sum(float(line.split()[0]) for line in lines) == pytest.approx(100, abs=0.1)


@pytest.mark.parametrize("step", [1, 6])
def test_a_stopped_run_goes_on_bit_for_bit(step: int, out: Path, recipe: Path, tmp_path: Path) -> None:
    run_until(step, "video", recipe, tmp_path / "out", *words(out.parent))
    run("video", recipe, tmp_path / "out", *words(out.parent))
    for name in ("model.safetensors", "head.safetensors"):
        same_weights(tmp_path / "out" / name, out / name)


def test_two_processes_learn_what_one_learns(recipe: Path, tmp_path: Path) -> None:
    more = ["run.engine=deepspeed", "run.epochs=1", "optim.lr=1e-4", "view.clips=2"]
    for name, processes in (("one", 1), ("two", 2)):
        run("video", recipe, tmp_path / name, *more, processes=processes)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert lineage(tmp_path / "two")["metrics"] == pytest.approx(lineage(tmp_path / "one")["metrics"], abs=0.01)


def test_positions_of_frames_go_on_with_more_frames(out: Path, recipe: Path, tmp_path: Path) -> None:
    """EVA-01's second step: other frames, and a classifier of images that starts from a video stage."""
    before = load_file(out / "head.safetensors")["time_embed"]
    assert before.abs().max() > 0
    run("video", recipe, tmp_path / "more", f"init_from={out}", "student.frames=6", "student.head_rows=all", "optim.lr=1e-12",
        "run.epochs=1", "optim.weight_decay=0")
    seeded = lineage(tmp_path / "more")["seeded"]
    assert seeded["reasons"]["time_embed"] == "3 -> 6 frames"
    after = load_file(tmp_path / "more" / "head.safetensors")["time_embed"]
    rows = np.array([[np.interp((frame + 0.5) / 2 - 0.5, range(3), before[0, :, 0, unit]) for unit in range(before.shape[-1])]
                     for frame in range(6)])
    assert np.allclose(after[0, :, 0].numpy(), rows, atol=1e-5)
    run("classify", write_recipe(tmp_path, CLASSIFY), tmp_path / "image", f"init_from={out}", "run.epochs=1")
    assert timm.create_model(f"local-dir:{out}", pretrained=True)(torch.zeros(1, 3, 32, 32)).shape == (1, 4)


def test_real_videos_in_folders(tmp_path: Path) -> None:
    """Encoded files, decoded by loader processes; the videos of 3 frames are named and replaced."""
    data = contents(tmp_path / "videos", "files") | {"root": str(tmp_path / "videos"), "val_share": 0.34, "max_broken": 1.0}
    tree = VIDEO | {"data": data | {"workers": 2}, "student": VIDEO["student"] | {"frames": 4}}
    more = ["run.global_batch=4", "view.crops=3", "view.sampling=dense", "view.stride=2", "run.epochs=4"]
    said = run("video", write_recipe(tmp_path, tree), tmp_path / "out", *more).stderr
    assert "it has 3 frames, fewer than student.frames=4" in said
    assert lineage(tmp_path / "out")["finished"]


@pytest.mark.parametrize(("changes", "text"), [
    (["student.name=convnet_nano_32", "student.patch_size=null"], "has no sequence of patches for all frames"),
    (["data.video=null"], "data.video must be given: what this stage learns from (docs/video.md)"),
    (["view.stride=3"], "view.stride: is for view.sampling=dense"),
    (["view.crops=2"], "view.crops: Input should be 1 or 3"),
])  # fmt: skip
def test_settings_that_do_not_fit(changes: list[str], text: str, recipe: Path, tmp_path: Path) -> None:
    said = run("video", recipe, tmp_path / "out", *changes, code=2).stderr
    assert text in said
    assert "Traceback" not in said
