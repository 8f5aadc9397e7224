"""Our classification stage against timm's own training loop on CIFAR-10, and the chain against both.

    python -m tools.cifar10_against_timm --timm-train PATH/train.py [--data ../shared/data/cifar10] [--out runs/against_timm]

PATH is a checkout of huggingface/pytorch-image-models: timm's pip package has no train.py. Both loops train from scratch with the
settings of configs/classify/cifar10_target.yaml, from which timm's command line is made. One differs from the file: the warm-up
takes a third of the run, since timm's takes whole epochs. TIMM_FUSED_ATTN=0 gives timm the attention kernel that is fast on CPUs
(ours is chosen by itself). The long runs have as many epochs as the chain's student in all its stages. Figures are on the 10,000
test photographs. What is finished is not run again. The table is printed and written to OUT/table.md.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import statistics
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import yaml

from eva_mim.core.recipe_files import read_yaml
from eva_mim.core.resolve import resolve
from finetune.classify import StageRecipe

RECIPE = "configs/classify/cifar10_target.yaml"
PHOTOGRAPHS, SHORT, LONG = 50_000, 3, 9
"""Training images; epochs of the recipe; 5 masked, 1 broad and 3 target epochs of the chain."""
WRAPPER = "import eva_mim.trunks.small, runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
TOP1 = r"(?:held out.*top1|Best metric:) ([\d.]+)"
RATE = r"(?: ([\d.]+) images/s|\(100%\)\].*?\([\d. ]+s, +([\d.]+)/s\))"
"""In the logs of both loops: images/s of a window of ours (evaluations left out), or of a whole epoch of timm's."""


def unpack(data: Path, out: Path) -> None:
    """The shards as OUT/{train,validation}/CLASS/KEY.jpg, bytes unchanged; nothing when they are there."""
    if (out / "complete").exists():
        return
    classes = (data / "classes.txt").read_text().splitlines()
    for split, pattern in (("train", "train-*.tar.gz"), ("validation", "test-*.tar.gz")):
        for shard in sorted(data.glob(pattern)):
            with tarfile.open(shard) as members:
                content = {member.name: file.read() for member in members if (file := members.extractfile(member))}
            for name, label in content.items():
                if name.endswith(".cls"):
                    image = out / split / classes[int(label)] / f"{name.removesuffix('.cls')}.jpg"
                    image.parent.mkdir(parents=True, exist_ok=True)
                    image.write_bytes(content[image.name])
    (out / "complete").touch()


def our_settings(data: Path, epochs: int, seed: int) -> list[str]:
    """Overrides of the recipe."""
    own = [f"data.root={data}", f"run.seed={seed}", f"run.epochs={epochs}", f"optim.warmup_epochs={epochs // 3}"]
    return [*own, "optim.layer_decay=1.0", "data.workers=0", "run.evaluate_every=100"]


def timm_line(train: Path, folders: Path, out: Path, settings: list[str]) -> list[str]:
    """timm's command line for the settings of our recipe."""
    recipe = resolve(StageRecipe, read_yaml(RECIPE), settings, RECIPE)
    student, view, run, optim = recipe.student, recipe.view, recipe.run, recipe.optim
    epochs, warmup = int(run.epochs or 0), int(optim.warmup_epochs)
    flags: dict[str, object] = {
        "data-dir": folders, "model": student.name, "num-classes": 10, "gp": student.global_pool, "drop-path": student.drop_path,
        "head-init-scale": student.head_scale, "batch-size": run.global_batch, "opt": "adamw", "lr": optim.lr,
        "opt-betas": list(optim.betas), "opt-eps": optim.eps, "weight-decay": optim.weight_decay,
        "epochs": epochs - warmup, "warmup-epochs": warmup, "warmup-prefix": [], "sched": "cosine", "sched-on-updates": [],
        "warmup-lr": optim.lr * run.global_batch / (warmup * PHOTOGRAPHS), "min-lr": optim.min_lr,
        "smoothing": recipe.mix.smoothing, "scale": list(view.crop_scale), "ratio": list(view.crop_ratio), "hflip": view.flip,
        "color-jitter": 0, "train-interpolation": "bicubic", "crop-pct": 1.0, "amp": [], "amp-dtype": "bfloat16",
        "device": "cpu", "workers": 0, "val-interval": epochs, "seed": run.seed, "output": out.parent, "experiment": out.name,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", *(value if isinstance(value, list) else [value]))]
    return [sys.executable, "-c", WRAPPER, *map(str, [train, *words])]


def outcome(out: Path, line: list[str], threads: int) -> dict[str, float]:
    """Top-1, wall seconds and images/s of the training steps of a command, from OUT.log; runs it unless it is finished."""
    log = Path(f"{out}.log")
    if not log.exists() or "wall seconds" not in log.read_text():
        sys.stderr.write(f"{out}\n")
        started, environment = time.monotonic(), os.environ | {"OMP_NUM_THREADS": str(threads), "TIMM_FUSED_ATTN": "0"}
        with log.open("a") as file:
            if subprocess.run(line, stdout=file, stderr=file, env=environment).returncode:
                sys.exit(f"failed, see {log}")
            file.write(f"wall seconds: {time.monotonic() - started:.1f}\n")
    top1, seconds = (float(re.findall(form, log.read_text())[-1]) for form in (TOP1, r"wall seconds: ([\d.]+)"))
    rates = [float(ours or theirs) for ours, theirs in re.findall(RATE, log.read_text())]
    return {"top1": top1, "seconds": seconds, "images_per_s": statistics.harmonic_mean(rates)}


def chain_line(data: Path, out: Path, seed: int) -> list[str]:
    """Teacher, masked, broad and target stage of the pipeline; the target with the warm-up of both loops."""
    known = {stage["name"]: stage for stage in read_yaml("configs/pipelines/cifar10.yaml")["stages"]}
    stages = [known[name] for name in ("clip_teacher", "mim", "broad", "target")]
    stages[-1]["settings"] = {"optim.warmup_epochs": SHORT // 3}
    settings = {"data.root": str(data), "data.workers": 0, "run.seed": seed, "run.evaluate_every": 100}
    Path(f"{out}.yaml").write_text(yaml.safe_dump({"settings": settings, "stages": stages}, sort_keys=False))
    return [sys.executable, "-m", "eva_mim.cli", "pipeline", f"{out}.yaml", "--out", str(out)]


def row(name: str, epochs: str, found: list[dict[str, float]]) -> str:
    """A line of the table: means and, over several seeds, standard deviation (n - 1)."""
    cells = [name, epochs]
    for key, digits in (("top1", 2), ("seconds", 0), ("images_per_s", 0)):
        values = [each[key] for each in found]
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
    return "| " + " | ".join([*cells, ", ".join(f"{each['top1']:.2f}" for each in found)]) + " |"


def main() -> int:
    """Run what is not finished and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timm-train", type=Path, required=True, help="train.py of huggingface/pytorch-image-models")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/cifar10"), help="CIFAR-10 as tar shards")
    parser.add_argument("--out", type=Path, default=Path("runs/against_timm"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the runs of 3 epochs")
    parser.add_argument("--long-seeds", type=int, nargs="*", default=[0], help="of the runs of 9 epochs and the chain")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    out, folders = given.out, given.out / "folders"
    unpack(given.data, folders)
    table = ["| run | epochs | top-1 | seconds | images/s | top-1 by seed |", "|---|---|---|---|---|---|"]
    lines: list[list[str]] = []
    for epochs, seeds in ((SHORT, given.seeds), (LONG, given.long_seeds)):
        found: list[dict[str, float]] = []
        for seed in seeds:  # alternating, so that both loops meet the same machine
            settings = our_settings(given.data, epochs, seed)
            runs = [out / f"{name}-{epochs}-{seed}" for name in ("timm", "ours")]
            lines += [timm_line(given.timm_train, folders, runs[0], settings),
                      [sys.executable, "-m", "eva_mim.cli", "classify", RECIPE, *settings, "--out", str(runs[1])]]
            found += [outcome(runs[place], lines[place - 2], given.threads) for place in (0, 1)]
        if found:
            table += [row("timm's train.py, scratch", str(epochs), found[::2]), row("eva-mim, scratch", str(epochs), found[1::2])]
    chains = [outcome(at := out / f"chain-{seed}", chain_line(given.data, at, seed), given.threads) for seed in given.long_seeds]
    table += [row("chain, with its teacher", "5 + 1 + 3", chains)] if chains else []
    text = "\n".join(table) + "\n\nTIMM_FUSED_ATTN=0 " + "\n\n".join(map(shlex.join, lines[:2])) + "\n"
    (out / "table.md").write_text(text)
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
