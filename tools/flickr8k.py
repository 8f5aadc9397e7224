"""What a masked stage is worth to a CLIP image tower on Flickr8k: one table, one command.

    python -m tools.flickr8k [--data ../shared/data/captions] [--out runs/flickr8k] [--seeds 0 1 2] [--jobs 2]

The stages are those of configs/pipelines/flickr8k.yaml: one teacher; then, for each seed, a pair of the same CLIP towers, trained
with the same samples and settings, whose image tower starts from a masked stage or from scratch. What is finished is not run
again. Recall is measured on the 1,000 test images and their 5,000 captions. The table is printed and written to OUT/table.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from eva_mim.core.recipe_files import read_yaml
from tools.cifar10_styles import cell, metrics, pipeline

STAGES = "configs/pipelines/flickr8k.yaml"
WAYS = {"image_to_text": "image to text", "text_to_image": "text to image"}
Job = tuple[str, list[str], int]
"""Folder, stages, seed."""


def tree(names: list[str], *, data: Path, seed: int, teacher: Path) -> dict[str, Any]:
    """Some stages of the pipeline, with the finished teacher in the place of its stage."""
    stages = [stage for stage in read_yaml(STAGES)["stages"] if stage["name"] in names]
    for stage in stages:
        if stage.pop("teacher", None):
            stage["settings"] = stage.get("settings", {}) | {"teacher.name": str(teacher)}
    return {"settings": {"data.root": str(data), "data.workers": 0, "run.seed": seed}, "stages": stages}


def run(jobs: list[Job], *, out: Path, data: Path, at_once: int) -> None:
    """Run chains, so many at once; each gets its share of the cores."""
    threads, teacher = max(1, (os.cpu_count() or 1) // min(at_once, len(jobs))), out / "teacher" / "clip_teacher"
    with ThreadPoolExecutor(at_once) as pool:
        waiting = [
            pool.submit(pipeline, out / folder, tree(names, data=data, seed=seed, teacher=teacher), threads)
            for folder, names, seed in jobs
        ]
        for future in waiting:
            future.result()


def table(out: Path, seeds: list[int]) -> str:
    """The table in Markdown: mean ± standard deviation over seeds, and below it every seed."""
    rows = {
        "image tower seeded by the masked stage": {seed: metrics(out / f"seeded-{seed}", "clip") for seed in seeds},
        "image tower from scratch": {seed: metrics(out / f"scratch-{seed}", "clip_scratch") for seed in seeds},
        "the teacher": {0: metrics(out / "teacher", "clip_teacher")},
    }
    figures = [(f"{way}_r{k}", f"{words} R@{k}") for way, words in WAYS.items() for k in (1, 5, 10)]
    columns = ["towers", "seeds", *(words for _, words in figures)]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for text, found in rows.items():
        done = {str(seed): row for seed, row in found.items() if row}
        single = {which: [row] for which, row in done.items()}
        for which, taken in ({", ".join(done): list(done.values())} | single).items():
            cells = [cell([row[name] for row in taken]) for name, _ in figures]
            lines.append(f"| {' | '.join([text, which or '-', *cells])} |")
    return "\n".join(lines) + "\n"


def seconds(out: Path) -> dict[str, float]:
    """Seconds of each stage of the pipeline, over all seeds."""
    found: dict[str, float] = {}
    for file in sorted(out.glob("*/*/lineage.json")):
        found[file.parent.name] = found.get(file.parent.name, 0.0) + json.loads(file.read_text())["seconds"]
    return found


def main() -> int:
    """Run what is not finished and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/captions"))
    parser.add_argument("--out", type=Path, default=Path("runs/flickr8k"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="chains run at once; the cores are shared out")
    arguments = parser.parse_args()
    if not arguments.data.is_dir():
        sys.stdout.write(f"skipped: {arguments.data} is not there (Flickr8k as tar shards with caption files)\n")
        return 0
    started, where = time.monotonic(), {"out": arguments.out, "data": arguments.data}
    # The towers from scratch need no teacher, so they train beside it.
    scratch: list[Job] = [(f"scratch-{seed}", ["clip_scratch"], seed) for seed in arguments.seeds]
    run([("teacher", ["clip_teacher"], 0), *scratch], at_once=arguments.jobs, **where)
    for first in range(0, len(arguments.seeds), arguments.jobs):
        together = arguments.seeds[first : first + arguments.jobs]
        run([(f"seeded-{seed}", ["mim", "clip"], seed) for seed in together], at_once=arguments.jobs, **where)
    text = table(arguments.out, arguments.seeds)
    (arguments.out / "table.md").write_text(text)
    stages = ", ".join(f"{name} {spent:.0f} s" for name, spent in seconds(arguments.out).items())
    sys.stdout.write(f"\n{text}\nwall time of this call {time.monotonic() - started:.0f} s; by stage, over all seeds: {stages}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
