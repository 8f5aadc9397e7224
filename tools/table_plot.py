"""Draws tables of the docs as bars: a bar for each row's mean, a mark for each seed.

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
    Picture("against.svg", "performance.md", "student", "cached / original",
            "images/s with targets from a cache, as a multiple of the original's live step", 14.0),
)


class Row(NamedTuple):
    """A row of a table."""

    name: str
    figures: list[float]

    @property
    def mean(self) -> float:
        """Mean of the figures."""
        return sum(self.figures) / len(self.figures)


def rows(text: str, picture: Picture) -> list[Row]:
    """Returns the rows of a picture's table on its page. Raises ValueError if there is no such table or column."""
    if (start := text.find(f"| {picture.table} |")) < 0:
        raise ValueError(f"{picture.page}: no table that begins with | {picture.table} |")
    lines = text[start:].split("\n\n")[0].splitlines()
    header, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
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


def main() -> int:
    """Reads the tables, writes the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    docs = parser.parse_args().docs
    for picture in PICTURES:
        (docs / picture.name).write_text(drawn(rows((docs / picture.page).read_text(), picture), picture))
    return 0


if __name__ == "__main__":
    sys.exit(main())
