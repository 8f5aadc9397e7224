"""What a person sees of a run: a line of at most 80 columns a log step, and between them a bar, or a line by time."""

from __future__ import annotations

import sys
import textwrap
import time
from typing import Any

from eva_mim.core.distributed import is_main
from eva_mim.core.log import duration, say

WIDTH = 80
FIRST, QUIET = 5.0, 30.0
"""Seconds until the first line by time, and between two lines if nothing else was said."""
REFRESHED = 0.25
"""Seconds between two drawings of the bar."""
NOTABLE = 0.05
"""Share of the time from which loading is named in a log line."""
LOADING = ("data", "read", "decode", "crop and resize", "to tensor", "augment", "mask")
"""Phases of a step in which the process loads data or waits for it."""


def step_line(step: int, total: int, values: dict[str, float], shares: dict[str, float], left: float) -> str:
    """Returns the line of a log step; `shares` are those of the time by phase, `left` the seconds to the end. The share of
    loading data is named where it is worth a look; all shares are in `metrics.jsonl`."""
    place = f"step {step:>{len(str(total))}}/{total}"
    parts = [place, f"loss {values['loss']:.4f}", f"lr {values['lr']:.1e}", f"|g| {values['grad_norm']:.3g}"]
    parts += [f"scale {values['loss_scale']:g}"] if "loss_scale" in values else []
    parts += [f"skipped {values['skipped']:.0f}"] if values["skipped"] else []
    parts.append(f"{values['images_per_s']:.4g} img/s")
    waits = sum(shares.get(name, 0.0) for name in LOADING)
    parts += [f"data {waits:.0%}"] if waits >= NOTABLE else []
    parts.append(f"left {duration(left)}")
    line = "  " + "  ".join(parts)
    return line if len(line) <= WIDTH else "  " + " ".join(parts)


def folded(text: str) -> str:
    """Returns an indented text in lines of at most 80 columns; words and paths stay whole."""
    return textwrap.fill(text, WIDTH, initial_indent="  ", subsequent_indent="    ", break_long_words=False,
                         break_on_hyphens=False)


def wrapped(head: str, figures: dict[str, float], tail: str = "") -> str:
    """Returns figures behind `head` in lines of at most 80 columns; a name stays beside its value."""
    pairs = [f"{name}\0{value:.4g}" for name, value in figures.items()] + ([tail.replace(" ", "\0")] if tail else [])
    return folded(f"{head} {'  '.join(pairs)}".lstrip()).replace("\0", " ")


class StepBar:
    """Progress between two log lines: a bar on the main rank's terminal, or a line by time where there is none. It reads nothing
    from the device, and draws in the thread that trains."""

    def __init__(self, total: int, first: int):
        self._total, self._first, self._bar = total, first, None
        self._began = self._told = time.monotonic()
        self._patience, self._facts = FIRST, ""
        if is_main() and sys.stderr.isatty():
            self._bar = _bar()

    def __enter__(self) -> StepBar:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("", total=self._total, completed=self._first, facts="")
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    def told(self, values: dict[str, float]) -> None:
        """Notes that a line was printed, with the figures for the bar."""
        self._told, self._patience = time.monotonic(), QUIET
        self._facts = f"loss {values['loss']:.4f}  {values['images_per_s']:.4g} img/s"

    def advance(self, step: int) -> None:
        """Notes that a step was queued."""
        now = time.monotonic()
        if self._bar is not None:
            if now - self._told >= REFRESHED:
                self._told = now
                self._bar.update(self._task, completed=step, facts=self._facts)
                self._bar.refresh()
        elif now - self._told >= self._patience:
            self._told, self._patience = now, QUIET
            left = (now - self._began) / max(1, step - self._first) * (self._total - step)
            say(f"  step {step:>{len(str(self._total))}}/{self._total}  left {duration(left)}")


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    # Without a thread of its own, since loader processes are forked while the bar stands.
    columns = (TextColumn("  step {task.completed:.0f}/{task.total:.0f}"), BarColumn(16), TextColumn("{task.fields[facts]}"),
               TimeRemainingColumn(compact=True))
    return Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True)
