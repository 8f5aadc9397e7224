"""What several teachers are worth on CIFAR-10: one table, one command.

    python -m tools.cifar10_teachers [--data ../shared/data/cifar10] [--out runs/cifar10_teachers] [--jobs 2]

Trains two of the three teachers of configs/mim/cifar10_teachers.yaml, writes one cache with the targets of all, of 4 views, and
trains students of all three and of each alone on the same 10,000 photographs, with and without masks, over three seeds; and of
all three with other normalisers, with dropping, and at several sizes. Each is measured on held-out photographs by k-NN, a linear
probe, fine-tuning on the same 10,000 labels, the cosine with each teacher, and zero-shot through the CLIP teacher's head. What is
finished is not run again. The table is printed and written to OUT/table.md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from tools.cifar10_styles import figures_table, pipeline, pipelines

RECIPE = "configs/mim/cifar10_teachers.yaml"
ALL = ("network", "clip", "pixels")
MASKED = {"mask.ratio": 0.41}
SEEDS = (0, 1, 2)
SIZES = (24, 32, 48)
"""Sides of the student's input in pixels."""
LABELS, FINE_TUNING_EPOCHS, VIEWS = 10_000, 3, 4


class Student(NamedTuple):
    """A row of the table."""

    key: str
    name: str
    teachers: tuple[str, ...]
    settings: dict[str, Any]
    seeds: tuple[int, ...] = SEEDS


def students() -> list[Student]:
    """Returns the rows of the table."""
    who = {"all": ALL} | {name: (name,) for name in ALL}
    rows = []
    for masks, settings in (("", {}), (", 41 % of the patches hidden", MASKED)):
        key = "_masked" if masks else ""
        rows += [Student(name + key, (f"{name} alone" if name != "all" else "all three") + masks, teachers, settings)
                 for name, teachers in who.items()]
    other = {"none": "none, raw MSE", "channel": "per channel", "pca": "whitening (PCA)", "zca": "whitening (ZCA)"}
    rows += [Student(f"all_{kind}", f"all three, normaliser {text}", ALL, _normaliser(kind), SEEDS[:1])
             for kind, text in other.items()]
    raw = {"objective.kind": "cosine", "teachers.pixels.objective.kind": "cosine"} | _normaliser("none")
    rows.append(Student("all_cosine", "all three, cosine without normaliser", ALL, raw, SEEDS[:1]))
    rows.append(Student("all_drop", "all three, each dropped from half of the images", ALL, {"teacher_drop": 0.5}, SEEDS[:1]))
    rows.append(Student("all_sizes", f"all three, at {', '.join(map(str, SIZES))} px in turn", ALL, _sizes(), SEEDS[:1]))
    return rows


def _sizes() -> dict[str, Any]:
    """Settings of a student whose size is drawn for each step; the targets are brought to its grid."""
    group = {"batch": 100, "image_size": list(SIZES)}
    return {"groups": {"all": group}} | {f"teachers.{name}.interpolate": "student" for name in ALL}


def _normaliser(kind: str) -> dict[str, Any]:
    return {"normaliser.kind": kind} if kind != "none" else {"normaliser": {"kind": "none"}}


def chain(student: Student, out: Path, data: Path, seed: int) -> dict[str, Any]:
    """Returns the pipeline of one student: its masked stage from the cache, a linear probe, and fine-tuning."""
    settings: dict[str, Any] = {"targets.cached": str(out / "cache"), **teachers_of(out), **student.settings}
    for name in ALL:
        if name not in student.teachers:
            settings = {key: value for key, value in settings.items() if not key.startswith(f"teachers.{name}.")}
    if "clip" in student.teachers:
        settings["evaluate.zeroshot"] = "clip"
    width = {"student.registers": 3, "data.limit": LABELS}
    probe = {"run.epochs": 3, **width}
    target = {"run.epochs": FINE_TUNING_EPOCHS, "run.evaluate_every": FINE_TUNING_EPOCHS, "run.precision": "fp32", **width}
    recipe = out / f"{'_'.join(student.teachers)}.yaml"
    return {"settings": {"data.root": str(data), "run.seed": seed, "data.workers": 0}, "stages": [
        {"name": "mim", "program": "mim", "recipe": str(recipe), "settings": settings},
        {"name": "linear", "program": "probe", "recipe": "configs/probe/cifar10.yaml", "init_from": "mim", "settings": probe},
        {"name": "target", "program": "classify", "recipe": "configs/classify/cifar10_target.yaml", "init_from": "mim",
         "settings": target},
    ]}


def teachers_of(out: Path) -> dict[str, Any]:
    """Returns the settings that name the teachers trained here."""
    return {f"teachers.{name}.name": str(out / "teachers" / name) for name in ("clip", "pixels")}


def write_recipes(out: Path) -> None:
    """Writes the recipe for each set of teachers."""
    import yaml

    tree = yaml.safe_load(Path(RECIPE).read_text())
    for names in {student.teachers for student in students()}:
        own = tree | {"teachers": {name: tree["teachers"][name] for name in names}}
        (out / f"{'_'.join(names)}.yaml").write_text(yaml.safe_dump(own, sort_keys=False))


def prepare(out: Path, data: Path) -> int:
    """Trains the teachers that are not there, writes the recipes and the cache of all targets; returns the exit code."""
    pixels = {"teacher": {"kind": "pixels", "name": "patch4", "image_size": 32}, "objective.kind": "mse", "run.epochs": 4}
    pipeline(out / "teachers", {"settings": {"data.root": str(data), "run.precision": "fp32"}, "stages": [
        {"name": "clip", "program": "clip", "recipe": "configs/clip/cifar10_teacher.yaml", "settings": {"run.epochs": 4}},
        {"name": "pixels", "program": "mim", "recipe": "configs/mim/cifar10.yaml", "settings": pixels},
    ]})
    write_recipes(out)
    cache = [sys.executable, "-m", "eva_mim.cli", "cache", str(out / f"{'_'.join(ALL)}.yaml"), f"data.root={data}",
             *(f"{name}={value}" for name, value in teachers_of(out).items()), "--program", "mim", "--views", str(VIEWS),
             "--dtype", "bf16", "--out", str(out / "cache")]
    return subprocess.run(cache).returncode


def table(out: Path, rows: list[Student]) -> str:
    """Returns the table in Markdown: means ± standard deviations (n - 1)."""
    figures = {"k-NN": ("mim", "knn_top1"), "linear probe": ("linear", "top1"), "fine-tuned": ("target", "top1"),
               "zero-shot": ("mim", "zeroshot_top1")}

    def cosines(row: Student) -> dict[str, tuple[str, str]]:
        return {f"cosine, {name}": ("mim", "cosine" if row.teachers == (name,) else f"cosine_{name}") for name in ALL}

    return figures_table("student of", [
        (row.name, [out / f"{row.key}-{seed}" for seed in row.seeds], figures | cosines(row)) for row in rows])


def main() -> int:
    """Run what is not finished and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/cifar10"))
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10_teachers"))
    parser.add_argument("--jobs", type=int, default=2, help="students trained at once; the cores are shared out")
    options = parser.parse_args()
    out = options.out
    if not options.data.is_dir():
        sys.stdout.write(f"skipped: {options.data} is not there (CIFAR-10 as tar shards)\n")
        return 0
    if code := prepare(out, options.data):
        return code
    rows = students()
    chains = {out / f"{row.key}-{seed}": chain(row, out, options.data, seed) for row in rows for seed in row.seeds}
    pipelines(chains, options.jobs)
    text = table(out, rows)
    (out / "table.md").write_text(text)
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
