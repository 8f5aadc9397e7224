"""Tiny recipes that train in seconds, and the real programs started as a user starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from eva_mim.core.contracts import StateGroup
from eva_mim.core.run_folder import folder_of
from eva_mim.run import checkpoints as snapshot
from tests import forked
from tests.conftest import REPOSITORY

SCENES = {"source": "scenes", "scenes": {"size": 32, "train": 96, "val": 24, "labels": "coarse"}, "workers": 0}
OPTIM = {"lr": 2e-3, "warmup_epochs": 1, "clip_grad": 1.0, "layer_decay": 0.8}
RUN = {"epochs": 2, "global_batch": 24, "precision": "fp32", "log_every": 1, "device": "cpu"}
VIT = {"name": "vit_nano_patch4_32"}

MIM: dict[str, Any] = {
    "data": SCENES, "run": RUN, "optim": OPTIM, "student": VIT, "teacher": {"kind": "timm", "name": "vit_nano_patch4_32"},
}
CLIP: dict[str, Any] = {
    "data": SCENES | {"templates": ["a {}"]}, "run": RUN, "optim": OPTIM,
    "student": VIT | {"embed_dim": 32, "text": {"width": 32, "layers": 1, "heads": 2, "context_length": 12}},
}
CLASSIFY: dict[str, Any] = {"data": SCENES, "run": RUN, "optim": OPTIM, "student": VIT}
MODULES = {"mim": "pretrain.mim", "clip": "pretrain.clip", "classify": "finetune.classify", "probe": "finetune.probe"}


def write_recipe(folder: Path, tree: dict[str, Any], name: str = "recipe.yaml") -> Path:
    """A recipe file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def environment(threads: int = 1) -> dict[str, str]:
    """This process's environment without a launcher's traces."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return kept | {"OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu"}


def python(module: str, *words: str | Path, processes: int = 1) -> list[str]:
    """`python -m MODULE ...`, under torchrun for several processes."""
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    return [*launcher, module, *map(str, words)]


def command(program: str, recipe: Path, out: Path, *overrides: str, processes: int = 1) -> list[str]:
    """The line of a stage program."""
    return python(MODULES[program], recipe, *overrides, "--out", out, processes=processes)


def finish(line: list[str], code: int = 0, **surroundings: str) -> subprocess.CompletedProcess[str]:
    """Run a line to its end and check its exit code."""
    done = forked.run(line, 400, cwd=REPOSITORY, env=environment() | surroundings, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wanted = {code, 1} if code and "torch.distributed.run" in line else {code}  # torchrun has a code of its own for a failed rank
    assert done.returncode in wanted, f"exit code {done.returncode}, wanted {code}\n{done.stdout}\n{done.stderr}"
    return done


def run(
    program: str, recipe: Path, out: Path, *overrides: str, processes: int = 1, code: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run a stage program to its end and check its exit code."""
    return finish(command(program, recipe, out, *overrides, processes=processes), code)


def records(out: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Records of a kind from a run's metrics.jsonl, which may be growing: what stands after the last line end is left out."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().split("\n")[:-1]]
    return [line for line in lines if line["kind"] == kind]


def losses(out: Path) -> list[float]:
    """Training loss of each step."""
    return [record["loss"] for record in records(out)]


def save(out: Path, step: int, parts: dict[str, StateGroup], facts: dict[str, Any], **keep: int) -> Path:
    """A checkpoint, written to its end."""
    writer = snapshot.Writer(out, **keep)
    writer.save(step, parts, facts)
    writer.close()
    writer.finish()
    return folder_of(out, step)
