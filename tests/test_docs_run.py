"""The commands of README and docs, run page by page in the order in which they stand, on small data and with tiny settings."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from eva_mim.core.registry import PROGRAMS
from tests.conftest import REPOSITORY, make_folder
from tests.convert.golden_files import golden
from tests.ranks import on_ranks, program
from tests.test_docs import commands

pytestmark = pytest.mark.slow
ELSEWHERE = {
    "make demo": "minutes; its stages are run here from docs/pipeline.md",
    "source ": "of the shell", "case ": "of the shell", "exit ": "of the shell", "srun ": "a cluster", "--nnodes=": "a cluster",
    "ViT-B-16": "a teacher that is downloaded", "dinov2.lvd142m": "a teacher that is downloaded",
    "eva02_base_patch14": "a teacher that is downloaded",
    "radio_s16": "teachers that are downloaded", "radio25_b": "run in tests/programs/test_recipes_radio.py",
    "vit_s16": "ImageNet", "vit_b16": "ImageNet", "photos_classifier": "starts from the run with the downloaded teacher",
    "RECIPE": "a recipe of the reader's", "recipe.yaml": "a recipe of the reader's", "eurosat": "data of 13 channels",
    "imagenet21k/train": "a large data set", "pytest": "tests", "tools.": "a tool", "bench data cifar": "made by a tool",
    "bench data photos": "made by a tool", "pack photos": "made by a tool", "data shards": "made by a tool",
    "/cifar10 ": "the tests' own shards have its form", "eva02_b.yaml": "run in tests/pipeline/test_preview.py",
    "caches/scenes_clip": "the demo's stages are run from docs/pipeline.md; tests/tasks/test_distill.py runs such commands",
    "vitamin_s_masked": "run in tests/pipeline/test_chains.py", "eva-mim sweep": "run in tests/pipeline/test_sweep.py",
    "own_masks": "a folder of the reader's", "own_videos": "a folder of the reader's",
    "data merge": "run in tests/data/test_merge.py",
    "bench resume": "starts programs; run in tests/commands/test_bench_step.py",
}
"""Part of a command that is not run here -> reason. All of them are parsed in `test_docs.py`."""
TINY = ["run.epochs=1", "run.log_every=1", "data.workers=0"]
SCENES = ["data.scenes.train=48", "data.scenes.val=24", "run.global_batch=24"]
FOLDER = ["data.limit=24", "run.global_batch=8"]


def runs(page: str) -> list[list[str]]:
    """The commands of a page that are run here."""
    every = commands(REPOSITORY / page)
    return [words for words in every if not any(part in f"{' '.join(words)} " for part in ELSEWHERE)]


def at(home: Path, module: str, words: list[str]) -> None:
    """A program, run where a person would stand."""
    os.chdir(home)
    try:
        program(module, words)
    finally:
        os.chdir(REPOSITORY)


def run(home: Path, words: list[str]) -> None:
    """A command of a page: absolute paths lie below `home`, and what trains does so for a few steps."""
    words = [word.replace("=/", f"={home}/") if "=/" in word else f"{home}{word}" if word.startswith("/") else word
             for word in words]
    if words[1] in (*PROGRAMS, "pipeline", "cache") or "-m" in words or words[1:3] == ["bench", "step"]:
        drawn = any("scenes" in word or "demo" in word for word in words)
        words += [*TINY, *(SCENES if drawn else FOLDER), *(["mim.run.epochs=1"] if words[1] == "pipeline" else [])]
    if words[0] == "torchrun":
        (count,) = [int(word.partition("=")[2]) for word in words if word.startswith("--nproc-per-node=")]
        module = words[words.index("-m") + 1]
        on_ranks(count, at, home, module, words[words.index(module) + 1 :])
    else:
        assert words[0] == "eva-mim"
        on_ranks(1, at, home, "eva_mim.cli", words[1:])


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with photographs of two classes below `data`."""
    make_folder(tmp_path / "data" / "photos", {"ant": 30, "bee": 30}, (72, 64))
    return tmp_path


def test_what_is_not_run_is_named_for_a_reason() -> None:
    """No reason is left over, and a page with a command that could be run has a test here."""
    pages = ["README.md", *(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md"))]
    every = [f"{' '.join(words)} " for page in pages for words in commands(REPOSITORY / page)]
    assert not [part for part in ELSEWHERE if not any(part in line for line in every)]
    assert {page for page in pages if runs(page)} == {
        "README.md", "docs/pipeline.md", "docs/data.md", "docs/features.md", "docs/performance.md", "docs/segmentation.md",
        "docs/video.md"}


def test_readme(home: Path, shared: Path) -> None:
    """Own images from the inspection to features, a network as the teacher, a checkpoint of the original code."""
    network = shared / "models" / "tf_efficientnet_lite0.safetensors"
    (home / "models").mkdir()
    if network.exists():
        (home / "models" / network.name).symlink_to(network)
    torch.save({"model": golden(shared, "eva02_b_mim").state}, home / "eva02_B_pt_in21k_p14.pt")
    every = runs("README.md")
    assert [words[1] for words in every] == ["data", "pipeline", "features", "pipeline", "inspect", "convert"]
    for words in every:
        if "photos_net" not in " ".join(words) or network.exists():
            run(home, words)
    assert "target_scratch" in (home / "runs" / "photos" / "summary.md").read_text()
    assert np.load(home / "vectors.npy").shape == (60, 96)
    assert (home / "vectors.nearest.png").is_file()
    assert (home / "eva02_b.safetensors").is_file()


def test_segmentation_and_video(home: Path) -> None:
    """Sheets of the drawn data, and a stage on it each."""
    for page in ("docs/segmentation.md", "docs/video.md"):
        for words in runs(page):
            run(home, words)
    assert (home / "runs" / "look" / "val.png").is_file()
    assert (home / "runs" / "scenes_segment" / "predictions.png").is_file()
    assert (home / "runs" / "scenes_video" / "classify_video.py").is_file()


def test_performance(home: Path, shared: Path) -> None:
    """Two measurements and their comparison; a cache, a run from it, its check."""
    network = shared / "models" / "tf_efficientnet_lite0.safetensors"
    if not network.exists():
        pytest.skip(f"no network: {network} does not exist")
    (home / "models").mkdir()
    (home / "models" / network.name).symlink_to(network)
    for words in runs("docs/performance.md"):
        run(home, words)
    assert (home / "before.json").is_file()
    assert (home / "runs" / "photos_cached" / "model.safetensors").is_file()


def test_a_chain_by_hand(home: Path) -> None:
    """The stages of the demo one by one, two processes under DeepSpeed, and the pipeline with settings of its own."""
    every = runs("docs/pipeline.md")
    assert len(every) == 8
    for words in every:
        run(home, words)
    assert (home / "runs" / "a" / "target" / "model.safetensors").is_file()
    assert (home / "runs" / "a" / "mim-zero2" / "model.safetensors").is_file()
    assert "clip_scratch" in (home / "runs" / "demo-long" / "summary.md").read_text()


@pytest.mark.parametrize("restarts", ["", "19", "20"])
def test_the_script_for_slurm_starts_again_what_can_go_on(tmp_path: Path, restarts: str) -> None:
    """The lines of docs/resume.md with a `srun` of each exit code and a `scontrol` that notes what is asked of it."""
    (block,) = re.findall(r"```sh\n(#SBATCH.*?)```", (REPOSITORY / "docs" / "resume.md").read_text(), re.S)
    (tmp_path / "job.sh").write_text(block)
    for name, line in (("srun", "exit $CODE"), ("scontrol", 'echo "$@" >> asked')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    again = set()
    for code in (0, 1, 2, 3, 69, 75, 130, 134, 137, 139, 143):
        (tmp_path / "asked").unlink(missing_ok=True)
        told = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CODE": str(code), "SLURM_JOB_ID": "4711"}
        done = subprocess.run(["sh", "job.sh"], cwd=tmp_path, env=told | ({"SLURM_RESTART_COUNT": restarts} if restarts else {}))
        assert done.returncode == code
        if (tmp_path / "asked").exists():
            assert (tmp_path / "asked").read_text() == "requeue 4711\n"
            again.add(code)
    assert again == (set() if restarts == "20" else {69, 75, 134, 137})


@pytest.mark.long
def test_data(home: Path) -> None:
    """From the inspection to the speed of a loader."""
    every = runs("docs/data.md")
    assert [words[1] if words[1] != "data" else words[2] for words in every] == [
        "inspect", "verify", "pack", "stats", "index", "bench"]
    for words in every:
        run(home, words)
    assert list((home / "data" / "shards").glob("train-*.tar"))


def test_features(home: Path) -> None:
    """Of a run that is there."""
    run(home, ["eva-mim", "classify", "configs/classify/own_images_cpu.yaml", "data.root=/data/photos", "--out", "runs/photos"])
    for words in runs("docs/features.md"):
        run(home, words)
    assert np.load(home / "vectors.npy").shape == (60, 96)
    assert (home / "vectors.parquet").is_file()
