"""`--dry-run` and `--print-shell`: steps and GPUs of the published chains, and scripts that start them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eva_mim.cli import main
from eva_mim.core.run_folder import RunFolder
from tests.conftest import REPOSITORY
from tests.tiny import CLASSIFY, environment, records, write_recipe

CHAIN = "configs/pipelines/eva02_b.yaml"


def test_steps_are_the_published_ones(capsys: pytest.CaptureFixture[str]) -> None:
    """Those that the recipes' headers give, from the original's logs and commands."""
    assert main(["pipeline", CHAIN, "--out", "runs/b", "--dry-run"]) == 0
    text = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line}
    assert rows["mim"] == ["mim", "mim", "-", "1,039,800", "2,048", "32", "x", "64"]
    assert rows["clip"][-5:] == ["61,035", "131,072", "64", "x", "2048"]
    header = (REPOSITORY / "configs/mim/eva02_b.yaml").read_text()
    assert "32 GPUs (4 x 8) x 64 images" in header
    assert "(1,039,800 steps)" in header
    assert max(map(len, text.splitlines())) <= 80


def test_fewer_gpus_accumulate(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pipeline", CHAIN, "--out", "runs/b", "--dry-run", "--gpus-per-node", "8"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert rows["mim"].endswith("8 x 64 x 4")
    assert rows["in1k"].endswith("8 x 64")


@pytest.mark.parametrize(("words", "said"), [
    (["--print-shell", "--nodes", "3", "--gpus-per-node", "8"],
     "stage mim: run.global_batch=2048 is not a multiple of run.micro_batch=64 x 24 processes = 1536; "
     "nearest: run.global_batch=1536 or run.global_batch=3072\n"),
    (["--dry-run", "--nodes", "2", "--gpus-per-node", "8"], "nearest: run.global_batch=1024 or run.micro_batch=32\n"),
    (["--print-shell", "--nodes", "2", "mim.run.engine=local"], "stage mim: run.engine=local runs one process, not 2; set"),
])
def test_what_cannot_be_cut_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pipeline", CHAIN, "--out", "runs/b", *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--nodes", "2"], ["--print-shell", "--nodes", "0"], ["--dry-run", "--gpus-per-node", "x"]])
def test_sizes_without_effect_or_sense(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["pipeline", CHAIN, "--out", "runs/b", *words])
    assert words[-2] in capsys.readouterr().err


def tools(folder: Path, **scripts: str) -> str:
    """A PATH with programs of these names in front."""
    folder.mkdir()
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    return f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"


@pytest.mark.parametrize(("surroundings", "nodes", "started"), [
    ({"SLURM_JOB_ID": "7"}, 4, "srun --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 --kill-on-bad-exit=1 eva-mim mim configs"),
    ({"HEAD": "n1"}, 4, "torchrun --nnodes=4 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-id=eva-mim --rdzv-endpoint=n1:29500"),
    ({}, 1, "torchrun --nnodes=1 --nproc-per-node=8 --standalone -m eva_mim.cli mim configs/mim/eva02_b.yaml --out runs/b/mim"),
    ({}, 4, "HEAD: is the name of the first node"),
])
def test_the_script_starts_each_stage(
    surroundings: dict[str, str], nodes: int, started: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By srun in an allocation, else by torchrun; the first stage that fails ends it, with its exit code."""
    words = [] if nodes == 1 else ["in1k.run.micro_batch=16"]
    line = ["pipeline", CHAIN, *words, "--out", "runs/b", "--print-shell", "--nodes", str(nodes), "--gpus-per-node", "8"]
    assert main(line) == 0
    script = capsys.readouterr().out
    said = {name: f'echo {name} "$@"; case "$*" in *in21k*) exit 75;; esac' for name in ("srun", "torchrun")}
    path = tools(tmp_path / "bin", **said)
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, env={"PATH": path} | surroundings)
    assert started in done.stdout + done.stderr
    if started.startswith("HEAD"):
        assert (done.returncode, done.stdout) == (2, "")
    else:
        assert done.returncode == 75
        assert len(done.stdout.splitlines()) == 3


@pytest.mark.long
def test_torchrun_passes_a_stop_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The script with the real torchrun: SIGTERM to torchrun alone writes a checkpoint, and the same script goes on from it."""
    run = CLASSIFY["run"] | {"engine": "deepspeed", "epochs": 60, "evaluate_every": 60}
    recipe = write_recipe(tmp_path, CLASSIFY | {"run": run}, "classify.yaml")
    file = write_recipe(tmp_path, {"stages": [{"name": "one", "program": "classify", "recipe": str(recipe)}]})
    out = tmp_path / "out"
    assert main(["pipeline", str(file), "--out", str(out), "--print-shell", "--gpus-per-node", "2"]) == 0
    script = capsys.readouterr().out
    surroundings = environment() | {"PATH": tools(tmp_path / "bin"), "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(["sh", "-c", script], env=surroundings, stderr=subprocess.PIPE, text=True)
    log, end = out / "one" / "metrics.jsonl", time.monotonic() + 120
    while not (log.exists() and log.read_text().count('"train"') > 5):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)
    torchrun, = (Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()).split()
    os.kill(int(torchrun), signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode != 0
    assert "SIGTERM: ending this step, then writing a checkpoint" in said
    found = RunFolder(out / "one").latest()
    assert found is not None
    assert found[0] == records(out / "one")[-1]["step"]
    done = subprocess.run(["sh", "-c", script], env=surroundings, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert f"going on from step {found[0]}" in done.stderr
    assert [record["step"] for record in records(out / "one")] == list(range(1, 241))
