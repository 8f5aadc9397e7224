"""Runs anybody's training program in this process, and reads clocks after its optimizer steps. The program knows nothing of it.

    python -m tools.against.probe REPORT WARM_UP STEPS BATCH MODULE|FILE.py [ARGUMENT ...]

torch calls a hook after every step of any optimizer. A step lasts from one call to the next, with its wait for data and its log
lines. After the last measured one, REPORT is written and the program is ended where it stands.
"""

from __future__ import annotations

import runpy
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from eva_mim.core.files import write_json
from tools.against.figures import Run


class Clocks(NamedTuple):
    """Seconds since some beginning; processor seconds are counted in steps of 10 ms."""

    wall: float
    tree: float
    """Processor seconds of this process and of all below it."""
    machine: float
    """Processor seconds of all processes; in a virtual machine also those that its host gave to others (steal)."""


def tree_seconds(process: psutil.Process) -> float:
    """Returns the processor seconds (user and system) of a process and of all below it. Ended ones count once they were waited
    for."""
    total = 0.0
    for one in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            times = one.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def read_clocks() -> Clocks:
    """Returns all clocks."""
    busy = psutil.cpu_times()
    machine = busy.user + busy.nice + busy.system + busy.irq + busy.softirq + busy.steal
    return Clocks(time.perf_counter(), tree_seconds(psutil.Process()), machine)


class Probe:
    """Counts optimizer steps, and reads the clocks before the first and after the last measured one."""

    def __init__(self, report: Path, warm_up: int, steps: int, batch: int):
        self.report, self.warm_up, self.steps, self.batch, self.done = report, warm_up, steps, batch, 0

    def __call__(self, optimizer: Any, *_: Any) -> None:
        """Is called after each step. Raises SystemExit after the last measured one."""
        self.done += 1
        if self.done == self.warm_up:
            self.began = read_clocks()
        if self.done < self.warm_up + self.steps:
            return
        wall, tree, machine = (after - before for before, after in zip(self.began, read_clocks(), strict=True))
        parameters = sum(one.numel() for group in optimizer.param_groups for one in group["params"])
        found = Run(self.batch * self.steps / wall, tree / self.steps, max(0.0, machine - tree) / wall, parameters)
        write_json(self.report, asdict(found))
        raise SystemExit(0)


def main() -> None:
    """Run the program of the command line."""
    report, *numbers = sys.argv[1:5]
    sys.argv = sys.argv[5:]
    from torch.optim.optimizer import register_optimizer_step_post_hook

    register_optimizer_step_post_hook(Probe(Path(report), *map(int, numbers)))
    if sys.argv[0].endswith(".py"):
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
