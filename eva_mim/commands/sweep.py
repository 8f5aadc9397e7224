"""`eva-mim sweep`: the cells of a sweep, each a pipeline, in any order and by several jobs at once; then one table."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from eva_mim.commands import chart, positive
from eva_mim.commands.sweep_table import Row, Size, write
from eva_mim.core.errors import Interrupted, UserError
from eva_mim.core.log import duration, say
from eva_mim.core.settings import few
from eva_mim.pipeline.sweep import Cell, Sweep, Values, cells_of, read_sweep
from eva_mim.run.program import guard


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0, 1 if a cell failed, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="eva-mim sweep",
        description="Trains the same chain of stages for several towers, numbers of samples, seeds and data; what is finished is "
        "not run again, and several of these commands share the cells of one folder. Then writes OUT/sweep.csv, sweep.md and a "
        "picture.",
    )
    parser.add_argument("sweep", help="YAML file, or the name of one that ships with eva-mim (configs/sweeps/...)")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="for all stages of all cells; STAGE.a.b=c for one stage")
    parser.add_argument("--out", type=Path, required=True, help="folder of the sweep; each cell gets a folder in it")
    parser.add_argument("--jobs", type=positive, default=1, metavar="N", help="cells at once, which share out the cores "
                        "(default 1)")
    parser.add_argument("--part", metavar="K/N", help="of N equal parts of the cells the K-th alone, for an array of jobs")
    parser.add_argument("--start", metavar="WORDS", help='what stands in place of "eva-mim" in a cell\'s command, such as '
                        '"torchrun --nproc-per-node=8 -m eva_mim.cli"')
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dry-run", action="store_true", help="check all cells and print what they cost")
    mode.add_argument("--print-shell", action="store_true", help="print each cell's command")
    mode.add_argument("--table", action="store_true", help="write table and picture of what is finished; run nothing")
    options = parser.parse_intermixed_args(argv)
    code = [0]

    def work() -> None:
        code[0] = sweep_of(options)

    return guard(work) or code[0]


def sweep_of(options: argparse.Namespace) -> int:
    """Checks all cells, runs those that are not finished, and writes the table; returns the exit code. Raises UserError."""
    sweep = read_sweep(options.sweep)
    cells = cells_of(sweep, options.out, _values(options.overrides))
    chosen = [cell for number, cell in enumerate(cells) if _in_part(options.part, number)]
    sizes = checked_sizes(sweep, cells)
    if options.dry_run:
        sys.stdout.write(_plan(sweep, cells, sizes))
        return 0
    if options.print_shell:
        start = options.start or "eva-mim"
        sys.stdout.writelines(f"{start} pipeline {shlex.quote(str(cell.write()))} --out {shlex.quote(str(cell.out))}\n"
                              for cell in chosen)
        return 0
    failed = [] if options.table else run(chosen, options.jobs, options.start)
    rows = [row for cell in cells if (row := _row(sweep, cell, sizes)) is not None]
    if not rows:
        say(f"none of {len(cells)} cells is finished")
        return 1
    _check_data(rows)
    write(sweep, rows, len(cells), options.out)
    if failed:
        say(f"{len(failed)} cells failed: {few(failed)}; each folder has its log.txt")
    return 1 if failed else 0


def _values(overrides: Sequence[str]) -> Values:
    if wrong := [text for text in overrides if "=" not in text]:
        raise UserError(f"{wrong[0]}: expected a setting as a.b=c")
    return {name: yaml.safe_load(value) for name, _, value in (text.partition("=") for text in overrides)}


def _in_part(part: str | None, number: int) -> bool:
    if part is None:
        return True
    first, slash, count = part.partition("/")
    if not (slash and first.isdigit() and count.isdigit() and 1 <= int(first) <= int(count)):
        raise UserError(f"--part {part}: expected K/N, with K from 1 to N")
    return number % int(count) == int(first) - 1


def checked_sizes(sweep: Sweep, cells: Sequence[Cell]) -> dict[str, Size]:
    """Returns what each tower costs, after the networks of one of its cells have been built without memory. Raises one UserError
    with the mistakes of all towers."""
    from eva_mim.core.registry import PROGRAMS, lookup
    from eva_mim.pipeline.networks import check_networks
    from eva_mim.pipeline.run import finished_stages
    from eva_mim.trunks import facts
    from eva_mim.trunks.meta import multiply_adds

    found, mistakes = dict[str, Size](), list[str]()
    for cell in cells:
        if cell.tower in found:
            continue
        try:
            check_networks(cell.planned, set(finished_stages(cell.planned)))
            stage = next(one for one in cell.planned if one.entry.name == sweep.stage)
            student: Any = lookup(PROGRAMS, stage.entry.program, "program").on_meta(stage.recipe).student
            settings = stage.recipe.student  # type: ignore[attr-defined]
            trunk = student.trunk
            found[cell.tower] = Size(float(sum(parameter.numel() for parameter in trunk.parameters())),
                                     float(multiply_adds(trunk, facts.image_size(trunk, settings), settings.channels)))
        except UserError as error:
            mistakes.append(f"{cell.tower}: {error}")
            found[cell.tower] = Size(math.nan, math.nan)
    if mistakes:
        raise UserError("\n".join(mistakes))
    return found


class Children:
    """Cells that run in processes of their own. A signal that ends this command is passed on to them, so that each writes a
    checkpoint; no further cell begins after it."""

    def __init__(self, words: Sequence[str], threads: int | None):
        """`words`: what stands before "pipeline"; `threads`: of each process, None for its own choice."""
        self._words, self._surroundings = words, os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
        self._alive: set[subprocess.Popen[bytes]] = set()
        self.caught = 0
        """Number of the signal; 0 for none."""

    def run(self, cell: Cell) -> int:
        """Runs a cell, whose output is its log.txt; returns its exit code."""
        path = cell.write()
        with (cell.out / "log.txt").open("a") as log:
            line = [*self._words, "pipeline", str(path), "--out", str(cell.out)]
            # In a session of its own: a terminal would send Ctrl-C to it as well, and twice means at once.
            child = subprocess.Popen(line, stdout=log, stderr=log, env=self._surroundings, start_new_session=True)
            self._alive.add(child)
            if self.caught:  # it came in between
                child.terminate()
            code = child.wait()
            self._alive.discard(child)
        return code

    def stop(self, number: int, frame: Any) -> None:
        """Handles a signal."""
        self.caught = number
        for child in list(self._alive):
            child.terminate()


def run(cells: Sequence[Cell], jobs: int, start: str | None) -> list[str]:
    """Runs the cells that are not finished, `jobs` at once; returns the names of those that failed. A cell that another command
    is running is left to it. Raises Interrupted after a signal, when the cells that ran have ended."""
    from eva_mim.pipeline.run import finished_stages

    waiting = [cell for cell in cells if len(finished_stages(cell.planned)) < len(cell.planned)]
    say(f"{len(cells)} cells, {len(cells) - len(waiting)} of them finished before")
    began, done, failed = time.monotonic(), [0], list[str]()
    words = shlex.split(start) if start else [sys.executable, "-m", "eva_mim.cli"]
    children = Children(words, None if jobs == 1 else max(1, (os.cpu_count() or 1) // jobs))

    def one(cell: Cell) -> None:
        if children.caught:
            return
        if in_use(cell.out):
            say(f"  {cell.name}: another command is running it")
            return
        at = time.monotonic()
        code = children.run(cell)
        done[0] += 1
        if code and not children.caught and not in_use(cell.out):
            failed.append(cell.name)
        left, spent = len(waiting) - done[0], time.monotonic() - began
        state = "done" if code == 0 else f"ended with code {code}, see {cell.out / 'log.txt'}"
        say(f"  {cell.name}: {state} ({duration(time.monotonic() - at)}); {left} left, about {duration(spent / done[0] * left)}")

    before = {number: signal.signal(number, children.stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        with ThreadPoolExecutor(jobs) as pool:
            for future in [pool.submit(one, cell) for cell in waiting]:
                future.result()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if children.caught:
        raise Interrupted(children.caught)
    return failed


def in_use(folder: Path) -> bool:
    """Returns whether a process holds the folder of a pipeline, or did so within the last minute and a half."""
    from eva_mim.core.lock import EXPIRED, LOCK

    try:
        return time.time() - (folder / LOCK).stat().st_mtime < EXPIRED
    except OSError:
        return False


def _row(sweep: Sweep, cell: Cell, sizes: Mapping[str, Size]) -> Row | None:
    """Returns the figures of a cell; None unless it is finished. Raises UserError for a figure that a stage does not have."""
    from eva_mim.core.run_folder import RunFolder
    from eva_mim.pipeline.run import finished_stages

    if len(finished_stages(cell.planned)) < len(cell.planned):
        return None
    records = {stage.entry.name: RunFolder(stage.out).record() for stage in cell.planned}
    figures: dict[str, float] = {}
    for figure in sweep.figures:
        stage, _, name = figure.partition(".")
        if "/" in name:
            figures |= _of_suite(cell.out / stage, figure, *name.split("/", 1))
            continue
        if name not in records[stage]["metrics"]:
            raise UserError(f"figures: {stage} has no figure {name}; it has {few(records[stage]['metrics'], 20)}")
        figures[figure] = float(records[stage]["metrics"][name])
    seconds = sum(record["seconds"] for record in records.values())
    data = [str(record["data"]["sha256"]) for record in records.values()]
    return Row(cell.tower, cell.source, cell.samples, cell.seed, sizes[cell.tower], figures, seconds, cell.name, data)


def _of_suite(stage: Path, figure: str, suite: str, mean: str) -> dict[str, float]:
    """Returns a mean of a suite by the figure's name; nothing before it was measured."""
    path = stage / f"{suite}.json"
    try:
        value = json.loads(path.read_text())["means"][mean]["value"] if path.is_file() else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"figures: {path} has no mean {mean!r}: {error!r}") from None
    return {} if value is None else {figure: float(value)}


def _check_data(rows: Sequence[Row]) -> None:
    """Raises UserError for cells of one source that learned from other records, or were measured on others."""
    known: dict[str, Row] = {}
    for row in rows:
        first = known.setdefault(row.source, row)
        if first.data != row.data:
            raise UserError(f"the cells {first.folder} and {row.folder} were trained or measured on other records, and do not "
                            "belong into one table: the data has changed between them")


def _plan(sweep: Sweep, cells: Sequence[Cell], sizes: Mapping[str, Size]) -> str:
    lines = [f"{'tower':<24} {'parameters':>12} {'multiply-adds':>14} {'cells':>6}"]
    for tower, size in sizes.items():
        count = sum(cell.tower == tower for cell in cells)
        lines.append(f"{tower:<24} {chart.short(size.parameters):>12} {chart.short(size.macs):>14} {count:>6}")
    images = sum(cell.samples for cell in cells)
    return "\n".join([*lines, f"{len(cells)} cells; stage {sweep.stage} sees {chart.short(images)} images in all"]) + "\n"
