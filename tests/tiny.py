"""Tiny recipes that train in seconds, and the real programs: called in processes that stay (`tests/ranks.py`) or started anew."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from eva_mim.core.contracts import StateGroup
from eva_mim.core.run_folder import RunFolder
from eva_mim.run import checkpoints as snapshot
from tests.conftest import REPOSITORY
from tests.ranks import LAUNCHERS, pool, program

SCENES = {"source": "scenes", "scenes": {"size": 32, "train": 96, "val": 24, "labels": "coarse"}, "workers": 0}
OPTIM = {"lr": 2e-3, "warmup_epochs": 1, "clip_grad": 1.0, "layer_decay": 0.8}
RUN = {"epochs": 2, "global_batch": 24, "precision": "fp32", "log_every": 1, "device": "cpu"}
NANO = {"name": "vit_nano_patch4_32"}
VIT = NANO | {"patch_size": 8}
"""16 patches: a quarter of the work of its own patches of 4 px."""

MIM: dict[str, Any] = {
    "data": SCENES, "run": RUN, "optim": OPTIM, "student": VIT,
    "teacher": {"kind": "timm", **NANO, "image_size": 16}, "evaluate": {"images": 24, "bank": 24},
}
CLIP: dict[str, Any] = {
    "data": SCENES | {"templates": ["a {}"]}, "run": RUN, "optim": OPTIM,
    "student": {"name": "vit_nano_patch4_24", "embed_dim": 32,
                "text": {"width": 32, "layers": 1, "heads": 2, "context_length": 12}},
}
CLASSIFY: dict[str, Any] = {"data": SCENES, "run": RUN, "optim": OPTIM, "student": VIT}
SEGMENT: dict[str, Any] = {
    "data": SCENES | {"segmentation": {}}, "run": RUN, "optim": OPTIM, "student": VIT, "view": {"scale": [0.75, 1.5]},
}
VIDEO: dict[str, Any] = {
    "data": SCENES | {"video": {"length": 6}}, "run": RUN, "optim": OPTIM, "student": VIT | {"frames": 3},
    "mix": {"smoothing": 0.0},
}
MODULES = {"mim": "pretrain.mim", "clip": "pretrain.clip", "classify": "finetune.classify", "probe": "finetune.probe",
           "segment": "finetune.segment", "video": "finetune.video"}


def write_recipe(folder: Path, tree: dict[str, Any], name: str = "recipe.yaml") -> Path:
    """A recipe file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def teacher_file(folder: Path) -> Path:
    """Weights of MIM's teacher, the same for every test."""
    import timm

    import eva_mim.trunks.small  # noqa: F401

    torch.manual_seed(5)
    path = folder / "teacher.safetensors"
    save_file(timm.create_model(NANO["name"], num_classes=0, img_size=16).state_dict(), path)
    return path


def environment(threads: int = 1) -> dict[str, str]:
    """This process's environment without a launcher's traces."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHERS}
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


def started(line: list[str], code: int = 0, **surroundings: str) -> subprocess.CompletedProcess[str]:
    """Run a line to its end as a program of its own and check its exit code."""
    done = subprocess.run(line, cwd=REPOSITORY, env=environment() | surroundings, capture_output=True, text=True, timeout=400)
    wanted = {code, 1} if code and "torch.distributed.run" in line else {code}  # torchrun has a code of its own for a failed rank
    return _checked(done, wanted)


def finish(line: list[str], code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the program of a line to its end in processes that are there already, and check its exit code."""
    words = line[line.index("-m") + 1 :]
    count = 1
    if words[0] == "torch.distributed.run":
        count = int(words[2].partition("=")[2])
        words = words[4:]
    if not words[0].startswith(("eva_mim.", "pretrain.", "finetune.", "tests.poison", "tests.stopping")):
        return started(line, code)
    outcomes = pool(count)(program, words[0], words[1:])
    texts = ["".join(texts) for texts in zip(*((outcome.out, outcome.err) for outcome in outcomes), strict=True)]
    first = next((outcome.value for outcome in outcomes if outcome.failed), 0)
    return _checked(subprocess.CompletedProcess(line, first, *texts), {code})


def _checked(done: subprocess.CompletedProcess[str], wanted: set[int]) -> subprocess.CompletedProcess[str]:
    assert done.returncode in wanted, f"exit code {done.returncode}, wanted {wanted}\n{done.stdout}\n{done.stderr}"
    return done


def run(
    stage: str, recipe: Path, out: Path, *overrides: str, processes: int = 1, code: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run a stage program to its end and check its exit code."""
    return finish(command(stage, recipe, out, *overrides, processes=processes), code)


def run_until(
    step: int | None, stage: str, recipe: Path, out: Path, *overrides: str, processes: int = 1, by: str = "SIGTERM"
) -> subprocess.CompletedProcess[str]:
    """Run a stage program until a signal comes in a step, or to its end for None."""
    words = [] if step is None else ["tests.stopping", str(step), by]
    module, *rest = *words, *([stage] if words else [MODULES[stage]]), str(recipe), *overrides, "--out", str(out)
    return finish(python(module, *rest, processes=processes))


def masked_stage(home: Path) -> Path:
    """A finished masked stage of one epoch in `home`, for the next stage to begin from."""
    tree = MIM | {"teacher": MIM["teacher"] | {"weights": str(teacher_file(home))}}
    run("mim", write_recipe(home, tree), home / "mim", "run.epochs=1")
    return home / "mim"


def stopped_after(step: int, source: Path, out: Path) -> Path:
    """A copy of a run as a kill right after the checkpoint of `step` and a later log line would have left it."""
    shutil.copytree(source, out)
    for folder in (out / "checkpoints").iterdir():
        if folder > RunFolder(out).checkpoint(step):
            shutil.rmtree(folder)
    record = json.loads((out / "lineage.json").read_text())
    (out / "lineage.json").write_text(json.dumps(record | {"finished": False}))
    for name in ("model.safetensors", "head.safetensors", "ema"):
        found = out / name
        shutil.rmtree(found) if found.is_dir() else found.unlink(missing_ok=True)
    return out


def same_weights(found: Path, expected: Path) -> None:
    """Bit for bit."""
    wanted, is_ = load_file(expected), load_file(found)
    assert is_.keys() == wanted.keys()
    assert not [name for name, value in wanted.items() if not torch.equal(is_[name], value)]


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
    return RunFolder(out).checkpoint(step)
