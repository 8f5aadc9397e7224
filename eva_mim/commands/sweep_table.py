"""The table of a sweep, as Markdown, CSV and a picture: cells and published points."""

from __future__ import annotations

import csv
import io
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from eva_mim.commands import chart
from eva_mim.core.errors import UserError
from eva_mim.core.log import say
from eva_mim.pipeline.sweep import ONE, Sweep


class Size(NamedTuple):
    """What an image tower costs."""

    parameters: float
    macs: float
    """Multiply-adds for an image."""


class Row(NamedTuple):
    """A finished cell, or a published point."""

    tower: str
    source: str
    samples: int
    seed: int | None
    """None: published."""
    size: Size
    figures: Mapping[str, float]
    seconds: float
    folder: str
    data: Sequence[str] = ()
    """Hash of the records of each stage."""


def write(sweep: Sweep, rows: Sequence[Row], cells: int, out: Path) -> None:
    """Writes sweep.csv, sweep.md and sweep.png, and prints the table. Raises UserError."""
    from eva_mim.core.files import write_text

    theirs = [Row(one.tower, "published", one.samples, None, Size(one.parameters, one.macs), one.figures, 0.0, "")
              for one in sweep.published]
    say(f"{len(rows)} of {cells} cells are finished")
    text = "\n".join(table(figure, rows) for figure in sweep.figures)
    try:
        write_text(out / "sweep.csv", as_csv(sweep.figures, [*rows, *theirs]))
        write_text(out / "sweep.md", f"{len(rows)} of {cells} cells.\n\n{text}")
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror or error}") from None
    draw(sweep.figures[0], rows, theirs, out / "sweep.png")
    sys.stdout.write(text + f"{out / 'sweep.csv'}, sweep.md, sweep.png\n")


def as_csv(figures: Sequence[str], rows: Sequence[Row]) -> str:
    """Returns a line for each cell and published point."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["tower", "source", "samples", "seed", "parameters", "macs", *figures, "seconds", "folder"])
    for row in rows:
        writer.writerow([row.tower, row.source, row.samples, "" if row.seed is None else row.seed, f"{row.size.parameters:.0f}",
                         f"{row.size.macs:.0f}", *(row.figures.get(figure, "") for figure in figures), f"{row.seconds:.1f}",
                         row.folder])
    return file.getvalue()


def curves(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Returns the rows of each tower, with its source if there are several."""
    several = len({row.source for row in rows} - {ONE}) > 1
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(f"{row.tower} {row.source}" if several else row.tower, []).append(row)
    return found


def slope(rows: Sequence[Row], figure: str) -> tuple[float, float]:
    """Returns the growth of a figure with each doubling of the samples, by least squares, and its standard error over all cells;
    NaN for one number of samples, and for an error of two cells."""
    points = [(math.log2(row.samples), row.figures[figure]) for row in rows if figure in row.figures]
    if len({x for x, _ in points}) < 2:
        return math.nan, math.nan
    centre, mean = (statistics.mean(values) for values in zip(*points, strict=True))
    square = sum((x - centre) ** 2 for x, _ in points)
    found = sum((x - centre) * (y - mean) for x, y in points) / square
    rest = sum((y - mean - found * (x - centre)) ** 2 for x, y in points)
    return found, math.sqrt(rest / (len(points) - 2) / square) if len(points) > 2 else math.nan


def table(figure: str, rows: Sequence[Row]) -> str:
    """Returns a table in Markdown: by tower what it costs, the figure for each number of samples (mean ± standard deviation, n -
    1), and its growth with each doubling of the samples."""
    samples = sorted({row.samples for row in rows})
    heads = ["tower", "parameters", "multiply-adds", *(f"{figure}, {chart.short(count)}" for count in samples), "per doubling"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, own in curves(rows).items():
        size = own[0].size
        there = [row for row in own if figure in row.figures]
        cells = [_cell([row.figures[figure] for row in there if row.samples == count]) for count in samples]
        growth, error = slope(own, figure)
        told = "-" if math.isnan(growth) else f"{growth:+.2f}" + ("" if math.isnan(error) else f" ± {error:.2f}")
        lines.append(f"| {' | '.join([name, chart.short(size.parameters), chart.short(size.macs), *cells, told])} |")
    return "\n".join(lines) + "\n"


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.2f}"
    return mean + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def draw(figure: str, rows: Sequence[Row], theirs: Sequence[Row], path: Path) -> None:
    """Writes the figure over samples, parameters and multiply-adds. Raises UserError."""
    known = curves([*rows, *(row for row in theirs if figure in row.figures)])
    values = [row.figures[figure] for own in known.values() for row in own]
    room = 0.08 * (max(values) - min(values)) or 1.0
    axes: list[tuple[str, Callable[[Row], float]]] = [
        ("samples seen", lambda row: row.samples), ("parameters of the image tower", lambda row: row.size.parameters),
        ("multiply-adds for an image", lambda row: row.size.macs)]
    panels = []
    for title, place in axes:
        series = []
        for name, own in known.items():
            dots = [(place(row), row.figures[figure]) for row in own]
            means = sorted((x, statistics.mean(y for other, y in dots if other == x)) for x in {x for x, _ in dots})
            series.append(chart.Series(name, means, dots))
        panels.append(chart.Panel(f"{figure} over {title}", series, min(values) - room, max(values) + room))
    chart.draw(panels, path, note="dots: cells, lines: means", option="--out")
