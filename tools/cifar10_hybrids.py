"""What masking is worth to a hybrid on CIFAR-10, beside a plain ViT of as many multiply-adds: a table for each teacher.

    python -m tools.cifar10_hybrids [--data ../shared/data/cifar10] [--out runs/cifar10_hybrids] [--teachers DIR] [--jobs 2]

Students learn from the cache of `tools.cifar10_teachers` (made if it is not there): 10,000 photographs, 4 views, a network that
saw ImageNet, or a CLIP model. Each is measured on held-out photographs by k-NN, a linear probe, and fine-tuning on the same
10,000 labels; from scratch by fine-tuning alone. What is finished is not run again. The tables are printed and written to
OUT/table.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

from tools.cifar10_styles import figures_table, pipelines
from tools.cifar10_teachers import FINE_TUNING_EPOCHS, LABELS, prepare, teachers_of

TEACHERS = {"network": "a network that saw ImageNet", "clip": "a CLIP model"}
HYBRID, VIT = {"student.name": "vitamin_nano_32"}, {"student.name": "vit_nano6_patch4_32"}
BLOCKS, RANDOM, NOTHING = {"mask.ratio": 0.41}, {"mask.ratio": 0.41, "mask.kind": "random"}, {"mask.ratio": 0.0}
SEEDS = (0, 1, 2)


class Student(NamedTuple):
    """A row of a table."""

    key: str
    name: str
    trunk: dict[str, Any]
    settings: dict[str, Any] | None
    """Of its masked stage; None: from scratch."""
    seeds: tuple[int, ...] = SEEDS


ROWS = (
    Student("hybrid_blocks", "hybrid, 41 % hidden in blocks, pixels filled", HYBRID, BLOCKS | {"student.form": "pixel_fill"}),
    Student("hybrid_random", "hybrid, 41 % hidden at random, pixels filled", HYBRID, RANDOM | {"student.form": "pixel_fill"},
            SEEDS[:1]),
    Student("hybrid_convolutions", "hybrid, 41 % hidden in blocks, masked convolutions", HYBRID,
            BLOCKS | {"student.form": "masked_conv"}, SEEDS[:1]),
    Student("hybrid_plain", "hybrid, nothing hidden", HYBRID, NOTHING | {"student.form": "pixel_fill"}),
    Student("vit_blocks", "plain ViT, 41 % hidden in blocks", VIT, BLOCKS),
    Student("vit_plain", "plain ViT, nothing hidden", VIT, NOTHING),
    Student("hybrid_scratch", "hybrid from scratch", HYBRID, None),
    Student("vit_scratch", "plain ViT from scratch", VIT, None),
)


def folder_of(out: Path, row: Student, teacher: str, seed: int) -> Path:
    """Returns the folder of a student; from scratch it is the same for all teachers."""
    return out / ("-".join([row.key, *([teacher] if row.settings is not None else []), str(seed)]))


def chain(row: Student, teacher: str, teachers: Path, data: Path, seed: int) -> dict[str, Any]:
    """Returns the pipeline of one student: its masked stage from the cache, a linear probe, and fine-tuning."""
    target = {"run.epochs": FINE_TUNING_EPOCHS, "run.evaluate_every": FINE_TUNING_EPOCHS, "run.precision": "fp32",
              "data.limit": LABELS}
    classify = {"name": "target", "program": "classify", "recipe": "configs/classify/cifar10_target.yaml"}
    common = {"data.root": str(data), "run.seed": seed, "data.workers": 0} | row.trunk
    if row.settings is None:
        return {"settings": common, "stages": [classify | {"settings": target | {"optim.layer_decay": 1.0}}]}
    place = {name: value for name, value in teachers_of(teachers).items() if name.startswith(f"teachers.{teacher}.")}
    student = {"student.registers": None, "student.class_tokens": "none"}
    settings = {"targets.cached": str(teachers / "cache")} | place | student | row.settings
    return {"settings": common, "stages": [
        {"name": "mim", "program": "mim", "recipe": str(teachers / f"{teacher}.yaml"), "settings": settings},
        {"name": "linear", "program": "probe", "recipe": "configs/probe/cifar10.yaml", "init_from": "mim",
         "settings": {"run.epochs": 3, "data.limit": LABELS}},
        classify | {"init_from": "mim", "settings": target},
    ]}


def table(out: Path, teacher: str) -> str:
    """Returns a teacher's table in Markdown: means ± standard deviations (n - 1)."""
    figures = {"k-NN": ("mim", "knn_top1"), "linear probe": ("linear", "top1"), "fine-tuned": ("target", "top1"),
               "cosine": ("mim", "cosine")}
    rows = [(row.name, [folder_of(out, row, teacher, seed) for seed in row.seeds], figures) for row in ROWS]
    return figures_table(f"student of {TEACHERS[teacher]}", rows)


def main() -> int:
    """Run what is not finished and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/cifar10"))
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10_hybrids"))
    parser.add_argument("--teachers", type=Path, default=Path("runs/cifar10_teachers"), help="folder of tools.cifar10_teachers")
    parser.add_argument("--jobs", type=int, default=2, help="students trained at once; the cores are shared out")
    options = parser.parse_args()
    if not options.data.is_dir():
        sys.stdout.write(f"skipped: {options.data} is not there (CIFAR-10 as tar shards)\n")
        return 0
    if code := prepare(options.teachers, options.data):
        return code
    seeds = sorted({seed for row in ROWS for seed in row.seeds})
    chains = {folder_of(options.out, row, teacher, seed): chain(row, teacher, options.teachers, options.data, seed)
              for seed in seeds for teacher in TEACHERS for row in ROWS if seed in row.seeds}
    pipelines(chains, options.jobs)
    text = "\n".join(table(options.out, teacher) for teacher in TEACHERS)
    (options.out / "table.md").write_text(text)
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
