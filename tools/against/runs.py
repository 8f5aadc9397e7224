"""Runs of programs, one after the other, each in a process and a folder of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from eva_mim.core.errors import UserError
from eva_mim.core.log import say
from tools.against.figures import Run

REPOSITORY = Path(__file__).parents[2]
WARM_UP = 2
"""Steps before the measured ones, in which caches fill and memory is taken."""


class Side(NamedTuple):
    """One side of a comparison: a program, as `tools.against.probe` takes it, and what its environment has besides."""

    name: str
    program: Sequence[str]
    environment: Mapping[str, str] = {}


class Job(NamedTuple):
    """Sides whose runs alternate; ours are compared with theirs."""

    title: str
    ours: Sequence[Side]
    theirs: Side


def start(side: Side, work: Path, folder: Path, *before: str) -> None:
    """Runs `python -m BEFORE PROGRAM` of a side in `folder` to its end; the index of our data is kept in `work`. Raises UserError
    for another exit code than 0, with the error or else the last line that it printed."""
    words = [*before, *side.program]
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"PYTHONPATH": os.pathsep.join(paths), "EVA_MIM_CACHE": str(work / "index")}
    with (folder / "log.txt").open("w+") as log:
        environment = {**os.environ, **own, **side.environment}
        done = subprocess.run([sys.executable, "-m", *words], cwd=folder, env=environment, stdout=log, stderr=log, check=False)
        log.seek(0)
        said = [line.strip() for line in log if line.strip()] or ["it printed nothing"]
    if done.returncode:
        errors = [line for line in said if re.match(r"(\[rank0\]: )?(error|[\w.]+(Error|Exception)):", line)]
        raise UserError(f"{side.name} ended with exit code {done.returncode}: {[*said, *errors][-1]}")


def measured(side: Side, work: Path, steps: int, batch: int) -> Run:
    """Returns the figures of one run. Raises UserError if the program fails, or ends before its last step."""
    with TemporaryDirectory(dir=work) as folder:
        report = Path(folder) / "report.json"
        start(side, work, Path(folder), "tools.against.probe", *map(str, (report, WARM_UP, steps, batch)))
        if not report.exists():
            raise UserError(f"{side.name} ended before step {WARM_UP + steps}")
        return Run(**json.loads(report.read_text()))


def alternate(job: Job, work: Path, rounds: int, steps: int, batch: int) -> dict[str, list[Run]]:
    """Returns the runs of each side by its name. Each round has one run of every side, so that all meet the same machine. Raises
    UserError if a program fails."""
    sides = [job.ours[0], job.theirs, *job.ours[1:]]
    runs: dict[str, list[Run]] = {side.name: [] for side in sides}
    for number in range(rounds):
        for side in sides:
            runs[side.name].append(run := measured(side, work, steps, batch))
            say(f"round {number + 1} of {rounds}, {side.name}: {run}")
    return runs
