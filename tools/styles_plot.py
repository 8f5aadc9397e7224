"""Draws the table of pretraining styles in docs/results.md as docs/styles.svg: top-1, with a mark for each seed.

    python -m tools.styles_plot [--results docs/results.md] [--out docs/styles.svg]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

HEADING = "| pretraining |"
LABEL, BAR, HIGH, ROW = 470, 300, 70.0, 30
"""Widths of labels and of the longest bar in pixels, its figure in percent, and the height of a row."""


class Style(NamedTuple):
    """A row of the table."""

    name: str
    figures: list[float]
    """Top-1 of each seed."""

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return sum(self.figures) / len(self.figures)


def styles(text: str) -> list[Style]:
    """The rows that were fine-tuned. Raises ValueError if there is no such table."""
    if HEADING not in text:
        raise ValueError(f"no table that begins with {HEADING}")
    rows = text[text.index(HEADING) :].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return [Style(row[0], [float(part) for part in row[-1].split(",")]) for row in cells if row[-1] != "-"]


def drawn(found: list[Style]) -> str:
    """The picture as SVG."""
    height = ROW * (len(found) + 1) + 10
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{LABEL + BAR + 60}" height="{height}" font-family="sans-serif" '
             'font-size="12">', '<rect width="100%" height="100%" fill="white"/>',
             f'<text x="{LABEL}" y="18" fill="#444">top-1 on CIFAR-10 after fine-tuning on 10,000 labels, percent</text>']
    for number, style in enumerate(found):
        top = ROW * (number + 1)
        short = style.name if len(style.name) < 72 else f"{style.name[:70]}..."
        lines.append(f'<text x="{LABEL - 8}" y="{top + 15}" text-anchor="end">{escape(short)}</text>')
        lines.append(f'<rect x="{LABEL}" y="{top}" width="{BAR * style.mean / HIGH:.1f}" height="20" fill="#4c78a8"/>')
        marks = [f"{LABEL + BAR * figure / HIGH:.1f}" for figure in style.figures]
        lines += [f'<circle cx="{mark}" cy="{top + 10}" r="3" fill="#f58518"/>' for mark in marks]
        lines.append(f'<text x="{LABEL + BAR * style.mean / HIGH + 10:.1f}" y="{top + 15}">{style.mean:.1f}</text>')
    return "\n".join([*lines, "</svg>", ""])


def main() -> int:
    """Reads the table, writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--out", type=Path, default=Path("docs/styles.svg"))
    options = parser.parse_args()
    options.out.write_text(drawn(styles(options.results.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
