"""A pipeline's comparisons over several seeds: one table, one command.

    python -m tools.seeds configs/pipelines/demo.yaml [SETTING ...] [--seeds 0 1 2] [--out runs/demo_seeds] [--figures NAME ...]

Runs the pipeline with each `run.seed`, each in a folder of its own; what is finished is not run again. Each line of the table
is one figure (default: the first stage's headline) of one comparison of the pipeline file: means with standard deviations
(n - 1), all figures in the order of the seeds, and the smallest gap, from the worst seed of one side to the best of the other:
below 0, they overlap. OUT/table.md has the table too.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from eva_mim.core.errors import UserError
from eva_mim.core.files import write_text
from eva_mim.core.log import duration
from eva_mim.core.run_folder import RunFolder
from eva_mim.pipeline.plan import plan
from tools.cifar10_styles import cell


def table(out: Path, compare: list[list[str]], seeds: list[int], figures: list[str] | None = None) -> str:
    """Returns the comparisons of finished pipelines in OUT/SEED as a table in Markdown."""
    lines = ["| figure | first | by seed | other | by seed | difference | smallest gap |", "|---|---|---|---|---|---|---|"]
    for first, *others in compare:
        for other in others:
            records = {name: [RunFolder(out / str(seed) / name).record() for seed in seeds] for name in (first, other)}
            for figure in figures or [records[first][0]["headline"]]:
                ours, theirs = ([record["metrics"][figure] for record in records[name]] for name in (first, other))
                cells = [f"{first} {cell(ours)}", ", ".join(f"{value:.1f}" for value in ours)]
                cells += [f"{other} {cell(theirs)}", ", ".join(f"{value:.1f}" for value in theirs)]
                gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
                lines.append(f"| {figure} | {' | '.join(cells)} | {cell(gaps)} | {min(ours) - max(theirs):.1f} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run what is not finished and print the table; returns the exit code of a pipeline that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline")
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/demo_seeds"))
    parser.add_argument("--figures", nargs="+", metavar="NAME")
    options = parser.parse_intermixed_args()
    try:
        file, _ = plan(options.pipeline, options.settings, options.out)
    except UserError as error:
        sys.stderr.write(f"{error.message()}\n")
        return error.exit_code
    times = []
    for seed in options.seeds:
        started = time.monotonic()
        line = [sys.executable, "-m", "eva_mim.cli", "pipeline", options.pipeline, *options.settings, f"run.seed={seed}"]
        if code := subprocess.run([*line, "--out", str(options.out / str(seed))]).returncode:
            return code
        times.append(duration(time.monotonic() - started))
    text = table(options.out, file.compare, options.seeds, options.figures)
    write_text(options.out / "table.md", text)
    sys.stdout.write(f"{text}wall time by seed: {', '.join(times)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
