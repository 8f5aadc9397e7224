"""What masking and the target are worth on CIFAR-10: one table, one command.

    python -m tools.cifar10_styles [--data ../shared/data/cifar10] [--out runs/cifar10_styles] [--jobs 2]

Every style pretrains the same student with the same samples, schedule and teacher, and is then measured by k-NN, a linear probe
and fine-tuning on LABELLED of the training photographs; figures are on the 10,000 test photographs. What is finished is not run
again. The table is printed and written to OUT/table.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

PHOTOGRAPHS, EPOCHS = 50_000, 4
"""Of pretraining: 200,000 samples seen by every style."""
LABELLED, FINE_TUNING_EPOCHS = 10_000, 5
SEEDS = (0, 1, 2)
STUDENT = {"student.name": "vit_nano_patch4_32"}
STYLES: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "eva": ("EVA style: 26 of 64 patches hidden in blocks, teacher's features", {"mask.ratio": 0.41}, SEEDS),
    "visible": (
        "visible patches only: 48 of 64 hidden at random, decoder, teacher's features",
        {"student.form": "visible", "mask.kind": "random", "mask.ratio": 0.75, "student.decoder.width": 96,
         "student.decoder.depth": 2, "student.decoder.heads": 3},
        SEEDS[:1],
    ),
    "plain": ("plain distillation: nothing hidden, teacher's features of all patches", {"mask.ratio": 0.0}, SEEDS),
    "pixels": (
        "26 of 64 patches hidden in blocks, their pixels (normalised, squared error)",
        {"mask.ratio": 0.41, "teacher.kind": "pixels", "teacher.name": "patch4", "teacher.image_size": 32,
         "objective.kind": "mse"},
        SEEDS[:1],
    ),
}


def chain(style: str, teacher: Path, data: Path, seed: int) -> dict[str, Any]:
    """The pipeline of one style and seed: pretraining, probe, fine-tuning; from scratch only the last."""
    labelled = {"data.limit": LABELLED, "run.epochs": FINE_TUNING_EPOCHS, "run.evaluate_every": 100}
    target = {"name": "target", "program": "classify", "recipe": "configs/classify/cifar10_target.yaml"}
    stages: list[dict[str, Any]] = [target | {"settings": labelled | {"optim.layer_decay": 1.0}}]
    if style != "scratch":
        settings: dict[str, Any] = {
            "teacher.name": str(teacher), "data.limit": PHOTOGRAPHS, "run.epochs": EPOCHS, "run.evaluate_every": 100,
            "evaluate.images": 10_000, "evaluate.bank": LABELLED,
        }
        if style == "untrained":
            settings |= {"data.limit": 250, "run.epochs": 1, "optim.lr": 1e-12, "optim.min_lr": 0.0, "evaluate.bank": 250}
        else:
            settings |= STYLES[style][1]
        mim = {"name": "mim", "program": "mim", "recipe": "configs/mim/cifar10.yaml", "settings": settings}
        probe = {"name": "probe", "program": "probe", "recipe": "configs/probe/cifar10.yaml", "init_from": "mim",
                 "settings": labelled}
        stages = [mim, probe]
        if style != "untrained":  # its fine-tuning is the one from scratch
            stages.append(target | {"init_from": "mim", "settings": labelled})
    return {"settings": {"data.root": str(data), "run.seed": seed, "data.workers": 0} | STUDENT, "stages": stages}


def pipeline(out: Path, tree: dict[str, Any], threads: int | None = None) -> None:
    """Run a pipeline in a process of its own, by default on all cores; its log is OUT/log.txt. Exits with its code when it
    fails."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "pipeline.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    started = time.monotonic()
    with (out / "log.txt").open("a") as log:
        line = [sys.executable, "-m", "eva_mim.cli", "pipeline", str(out / "pipeline.yaml"), "--out", str(out)]
        own = os.environ | {"OMP_NUM_THREADS": str(threads or os.cpu_count() or 1)}
        code = subprocess.run(line, stdout=log, stderr=log, env=own).returncode
    sys.stdout.write(f"{out}: {'done' if code == 0 else f'failed, see {log.name}'} ({time.monotonic() - started:.0f} s)\n")
    sys.stdout.flush()
    if code:
        sys.exit(code)


def pipelines(trees: dict[Path, dict[str, Any]], jobs: int) -> None:
    """Run pipelines by folder, `jobs` at once, which share out the cores."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(pipeline, out, tree, threads) for out, tree in trees.items()]:
            future.result()


def metrics(out: Path, stage: str) -> dict[str, float]:
    """Figures of a finished stage; empty when the chain has none of that name."""
    file = out / stage / "lineage.json"
    found: dict[str, float] = json.loads(file.read_text()).get("metrics", {}) if file.exists() else {}
    return found


def cell(values: list[float]) -> str:
    """Mean and, over several seeds, standard deviation (n - 1)."""
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def figures_table(title: str, rows: list[tuple[str, list[Path], dict[str, tuple[str, str]]]]) -> str:
    """A table in Markdown: for each row its name, its folders by seed, and its figures by column, each a stage and a name;
    cosines times 100. The last column has every seed's fine-tuned figure."""
    columns = list(rows[0][2])
    lines = [f"| {title} | seeds | {' | '.join(columns)} | fine-tuned, by seed |", "|---" * (len(columns) + 3) + "|"]
    for name, folders, figures in rows:
        cells = []
        for stage, key in figures.values():
            values = [known[key] for folder in folders if key in (known := metrics(folder, stage))]
            cells.append(cell([100 * value if key.startswith("cosine") else value for value in values]))
        tuned = ", ".join(f"{metrics(folder, 'target').get('top1', float('nan')):.1f}" for folder in folders)
        lines.append(f"| {name} | {len(folders)} | {' | '.join(cells)} | {tuned} |")
    return "\n".join(lines) + "\n"


def table(out: Path, chains: list[tuple[str, int]]) -> str:
    """The table in Markdown; with several seeds mean ± standard deviation, and every seed's fine-tuned figure."""
    names = {style: text for style, (text, _, _) in STYLES.items()}
    names |= {"untrained": "untrained student", "scratch": "from scratch"}
    lines = ["| pretraining | seeds | k-NN | linear probe | fine-tuned | fine-tuned, by seed |", "|---|---|---|---|---|---|"]
    for style, text in names.items():
        folders = [out / f"{style}-{seed}" for s, seed in chains if s == style]
        found = [[metrics(folder, stage) for folder in folders] for stage in ("mim", "probe", "target")]
        knn = [row["knn_top1"] for row in found[0] if row]
        probe, tuned = ([row["top1"] for row in side if row] for side in found[1:])
        each = ", ".join(f"{value:.1f}" for value in tuned) or "-"
        lines.append(f"| {text} | {len(folders)} | {cell(knn)} | {cell(probe)} | {cell(tuned)} | {each} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run what is not finished and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/cifar10"))
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10_styles"))
    parser.add_argument("--jobs", type=int, default=2, help="chains run at once; the cores are shared out")
    arguments = parser.parse_args()
    if not arguments.data.is_dir():
        sys.stdout.write(f"skipped: {arguments.data} is not there (CIFAR-10 as tar shards)\n")
        return 0
    teacher = {"name": "clip_teacher", "program": "clip", "recipe": "configs/clip/cifar10_teacher.yaml",
               "settings": {"run.epochs": 3, "run.evaluate_every": 100}}
    pipeline(arguments.out / "teacher", {"settings": {"data.root": str(arguments.data)}, "stages": [teacher]})
    chains = [(style, seed) for style, (_, _, seeds) in STYLES.items() for seed in seeds]
    chains += [("scratch", seed) for seed in SEEDS] + [("untrained", 0)]
    trained = arguments.out / "teacher" / "clip_teacher"
    pipelines({arguments.out / f"{style}-{seed}": chain(style, trained, arguments.data, seed) for style, seed in chains},
              arguments.jobs)
    text = table(arguments.out, chains)
    (arguments.out / "table.md").write_text(text)
    sys.stdout.write("\n" + text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
