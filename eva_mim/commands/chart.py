"""Charts as PNG: panels in a row, each with lines and dots over a logarithmic axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eva_mim.core.errors import UserError

WIDTH, HEIGHT, EDGE, LEGEND = 560, 420, 60, 150
"""Sides of a panel, its margins, and the width of the names beside the last one, in pixels."""
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#9d755d", "#bab0ac", "#222222", "#eeca3b")
GREY, LETTERS = "#666666", 20
"""Letters of a name."""
Points = Sequence[tuple[float, float]]


class Series(NamedTuple):
    """What has one name and one colour."""

    name: str
    line: Points = ()
    dots: Points = ()


class Panel(NamedTuple):
    """One pair of axes."""

    title: str
    series: Sequence[Series]
    low: float = 0.0
    high: float = 1.0
    ticks: Sequence[float] = ()
    """Values of the horizontal axis with a label; default some that are there."""


def draw(panels: Sequence[Panel], path: Path, *, note: str, option: str = "--to") -> None:
    """Writes the panels, with the names of the last one's series; `note` says what lines and dots are. Raises UserError, with the
    option that named the place, for one that cannot be written."""
    from PIL import Image, ImageDraw, ImageFont

    from eva_mim.core.files import replacing

    picture, font = Image.new("RGB", (WIDTH * len(panels) + LEGEND, HEIGHT), "white"), ImageFont.load_default(12)
    pen = ImageDraw.Draw(picture)
    for number, panel in enumerate(panels):
        _panel(pen, font, panel, WIDTH * number)
    pen.text((EDGE, 34), note, GREY, font)
    left = WIDTH * len(panels) - EDGE + 20
    for number, series in enumerate(panels[-1].series):
        y, colour = EDGE + 16 * number, COLOURS[number % len(COLOURS)]
        pen.line([(left, y + 7), (left + 14, y + 7)], colour, 3)
        pen.text((left + 20, y), series.name[:LETTERS], colour, font)
    try:
        with replacing(path) as temporary:
            picture.save(temporary, "png")
    except OSError as error:
        raise UserError(f"{option} {path}: {error.strerror}") from None


def _panel(pen: Any, font: Any, panel: Panel, left: int) -> None:
    every = [x for series in panel.series for x, _ in [*series.line, *series.dots]]
    first, last = math.log(min(every)), math.log(max(every))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log(x) - first) / ((last - first) or 1.0)
        up = min(1.0, max(0.0, (y - panel.low) / (panel.high - panel.low)))
        return left + EDGE + across * (WIDTH - 2 * EDGE), HEIGHT - EDGE - up * (HEIGHT - 2 * EDGE)

    for step in range(6):
        value = panel.low + (panel.high - panel.low) * step / 5
        (x, y), (right, _) = place(min(every), value), place(max(every), value)
        pen.line([(x, y), (right, y)], "#dddddd")
        pen.text((left + EDGE - 40, y - 7), f"{value:.3g}", "black", font)
    for tick in panel.ticks or _some(every):
        pen.text((place(tick, panel.low)[0] - 10, HEIGHT - EDGE + 8), short(tick), "black", font)
    pen.text((left + EDGE, 16), panel.title, "black", font)
    for number, series in enumerate(panel.series):
        colour = COLOURS[number % len(COLOURS)]
        if len(series.line) > 1:
            pen.line([place(*point) for point in series.line], colour, 2)
        for x, y in (place(*point) for point in series.dots):
            pen.ellipse([x - 3, y - 3, x + 3, y + 3], colour)


def _some(values: Sequence[float]) -> list[float]:
    """Returns a few of the values that do not stand too close to each other."""
    chosen, span = list[float](), math.log(max(values) / min(values)) or 1.0
    for value in sorted(set(values)):
        if not chosen or math.log(value / chosen[-1]) > span / 7:
            chosen.append(value)
    return chosen


def short(number: float) -> str:
    """Returns a number with three digits: 12.8M, 50k, 0.45."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
