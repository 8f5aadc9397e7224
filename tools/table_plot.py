"""Draws tables of the docs: as bars, one for each row's mean with a mark for each seed, or as lines over columns of numbers.

    python -m tools.table_plot
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

LABEL, BAR, ROW, LONGEST_NAME = 470, 300, 30, 72
"""Width of the names and of the longest bar and height of a row in pixels; letters of a name."""


class Picture(NamedTuple):
    """A picture in docs/ and the table that it shows."""

    name: str
    page: str
    """Page in docs/ with the table."""
    table: str
    """First header of the table; rows are called by this column."""
    column: str
    """Header of the column with the figures of a row, "1.5, 1.7"; a row with "-" is left out."""
    title: str
    high: float
    """Figure of the longest bar."""


PICTURES = (
    Picture("styles.svg", "results.md", "pretraining", "by seed",
            "top-1 on CIFAR-10 after fine-tuning on 10,000 labels, percent", 70.0),
    Picture("views.svg", "results.md", "views of a photograph", "by seed",
            "top-1 on CIFAR-10 after 8 epochs from a cache and fine-tuning on 10,000 labels, percent", 70.0),
    Picture("teachers.svg", "results.md", "student of", "fine-tuned, by seed",
            "top-1 on CIFAR-10 after fine-tuning on 10,000 labels, percent", 70.0),
    Picture("against.svg", "performance.md", "student", "cached / original",
            "images/s with targets from a cache, as a multiple of the original's live step", 14.0),
)


class Lines(NamedTuple):
    """A picture of a line for each row of a table, over those columns whose headers are numbers."""

    name: str
    page: str
    table: str
    title: str
    low: float
    high: float


LINES: tuple[Lines, ...] = (
    Lines("sizes.svg", "radio.md", "head, teacher", "cosine of patches with the teacher over the student's size in pixels",
          0.5, 1.0),
)
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2")
WIDTH, HEIGHT, EDGE = 560, 320, 48
"""Sides of the axes and their margin in pixels; names of lines stand to the right of them."""


class Row(NamedTuple):
    """A row of a table."""

    name: str
    figures: list[float]

    @property
    def mean(self) -> float:
        """Mean of the figures."""
        return sum(self.figures) / len(self.figures)


def cells_of(text: str, picture: Picture | Lines) -> tuple[list[str], list[list[str]]]:
    """Returns header and rows of a picture's table on its page. Raises ValueError if there is no such table."""
    if (start := text.find(f"| {picture.table} |")) < 0:
        raise ValueError(f"{picture.page}: no table that begins with | {picture.table} |")
    lines = text[start:].split("\n\n")[0].splitlines()
    header, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return header, body


def rows(text: str, picture: Picture) -> list[Row]:
    """Returns the rows of a picture's table on its page. Raises ValueError if there is no such table or column."""
    header, body = cells_of(text, picture)
    found = [(cells[0], cells[header.index(picture.column)]) for cells in body]
    return [Row(name, [float(part) for part in cell.split(",")]) for name, cell in found if cell != "-"]


def drawn(found: list[Row], picture: Picture) -> str:
    """Returns the picture as SVG."""
    height = ROW * (len(found) + 1) + 10
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{LABEL + BAR + 60}" height="{height}" font-family="sans-serif" '
             'font-size="12">', '<rect width="100%" height="100%" fill="white"/>',
             f'<text x="{LABEL}" y="18" fill="#444">{escape(picture.title)}</text>']
    for number, row in enumerate(found):
        top = ROW * (number + 1)
        short = row.name if len(row.name) < LONGEST_NAME else f"{row.name[: LONGEST_NAME - 2]}..."
        lines.append(f'<text x="{LABEL - 8}" y="{top + 15}" text-anchor="end">{escape(short)}</text>')
        lines.append(f'<rect x="{LABEL}" y="{top}" width="{BAR * row.mean / picture.high:.1f}" height="20" fill="#4c78a8"/>')
        marks = [f"{LABEL + BAR * figure / picture.high:.1f}" for figure in row.figures]
        lines += [f'<circle cx="{mark}" cy="{top + 10}" r="3" fill="#f58518"/>' for mark in marks]
        lines.append(f'<text x="{LABEL + BAR * row.mean / picture.high + 10:.1f}" y="{top + 15}">{row.mean:.1f}</text>')
    return "\n".join([*lines, "</svg>", ""])


def lined(text: str, picture: Lines) -> str:
    """Returns the picture of lines as SVG. Raises ValueError if there is no such table."""
    header, body = cells_of(text, picture)
    columns = [(place, float(name)) for place, name in enumerate(header) if name.replace(".", "").isdigit()]
    first, last = columns[0][1], columns[-1][1]

    def place(x: float, y: float) -> tuple[float, float]:
        up = (y - picture.low) / (picture.high - picture.low)
        return EDGE + (x - first) / (last - first) * (WIDTH - 2 * EDGE), HEIGHT - EDGE - up * (HEIGHT - 2 * EDGE)

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH + 300}" height="{HEIGHT}" font-family="sans-serif" '
           'font-size="12">', '<rect width="100%" height="100%" fill="white"/>',
           f'<text x="{EDGE}" y="24" fill="#444">{escape(picture.title)}</text>']
    for step in range(6):
        value = picture.low + (picture.high - picture.low) * step / 5
        (left, y), (right, _) = place(first, value), place(last, value)
        out.append(f'<line x1="{left:.1f}" y1="{y:.1f}" x2="{right:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        out.append(f'<text x="{left - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    out += [f'<text x="{place(x, picture.low)[0]:.1f}" y="{HEIGHT - EDGE + 18}" text-anchor="middle">{header[column]}</text>'
            for column, x in columns]
    for number, row in enumerate(body):
        colour = COLOURS[number % len(COLOURS)]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(x, float(row[column])) for column, x in columns))
        out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out.append(f'<text x="{WIDTH - EDGE + 12}" y="{EDGE + 18 * number}" fill="{colour}">{escape(row[0])}</text>')
    return "\n".join([*out, "</svg>", ""])


def main() -> int:
    """Reads the tables, writes the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    docs = parser.parse_args().docs
    for picture in PICTURES:
        (docs / picture.name).write_text(drawn(rows((docs / picture.page).read_text(), picture), picture))
    for lines in LINES:
        (docs / lines.name).write_text(lined((docs / lines.page).read_text(), lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
