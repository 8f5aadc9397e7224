"""Figures of runs, and their table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Run:
    """The measured steps of one run of a program."""

    images_per_s: float
    """By wall time."""
    cpu_seconds: float
    """Processor seconds of a step, of all processes of the program."""
    others: float
    """Cores that other processes used meanwhile."""
    parameters: int
    """Trained parameters."""

    def __str__(self) -> str:
        return f"{self.images_per_s:.4g} images/s, {self.cpu_seconds:.4g} cpu-s a step, others: {self.others:.2f} cores"


def ratios(ours: Sequence[Run], theirs: Sequence[Run]) -> dict[str, float]:
    """Returns ours / theirs of the medians over runs: "images_per_s" and "cpu_seconds"."""
    names = ("images_per_s", "cpu_seconds")
    return {name: median(getattr(run, name) for run in ours) / median(getattr(run, name) for run in theirs) for name in names}


def table(title: str, runs: Mapping[str, Sequence[Run]], theirs: str) -> str:
    """Returns text of 80 columns. `runs` are those of each side by its name, `theirs` is the name of the side to compare with."""
    lines = [title, "", f"{'median (min-max)':<16}{'images/s':>22}{'cpu-s a step':>22}{'parameters':>12}{'others':>8}"]
    for name, found in runs.items():
        cells = [_spread([getattr(run, figure) for run in found]) for figure in ("images_per_s", "cpu_seconds")]
        size, others = f"{found[0].parameters / 1e6:.2f}M", max(run.others for run in found)
        lines.append(f"{name:<16}{cells[0]:>22}{cells[1]:>22}{size:>12}{others:>8.2f}")
    for name, found in runs.items():
        if name != theirs:
            speed, cpu = ratios(found, runs[theirs]).values()
            lines.append(f"{name} / {theirs}: {speed:.3f} in images/s, {cpu:.3f} in cpu-s a step")
    return "\n".join([*lines, ""])


def _spread(values: Sequence[float]) -> str:
    return f"{median(values):.4g} ({min(values):.4g}-{max(values):.4g})"
