"""Contact sheets: pictures in rows, each with a few words below."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, ImageOps

from eva_mim.core.bands import Bands
from eva_mim.core.errors import UserError
from eva_mim.core.files import replacing

TILE, LINE, GAP = 144, 26, 4
"""Side of a tile, height of the text below it, and the space between tiles, in pixels."""


def write_sheet(cells: Iterable[tuple[Image.Image | Bands | None, str]], count: int, columns: int, path: Path) -> Path:
    """Writes `count` cells of (picture or none, words) in rows as a PNG; returns its path. Raises UserError for a place that
    cannot be written."""
    sheet = drawn_sheet(cells, count, columns)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            sheet.save(temporary, "png")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    return path


def drawn_sheet(cells: Iterable[tuple[Image.Image | Bands | None, str]], count: int, columns: int) -> Image.Image:
    """Returns `count` cells of (picture or none, words) in rows."""
    rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * (TILE + GAP) + GAP, rows * (TILE + LINE + GAP) + GAP), "white")
    font = ImageFont.load_default(11)
    for number, (image, text) in enumerate(cells):
        left, top = GAP + number % columns * (TILE + GAP), GAP + number // columns * (TILE + LINE + GAP)
        if image is not None:
            tile = ImageOps.contain(_as_colours(image), (TILE, TILE))
            sheet.paste(tile, (left + (TILE - tile.width) // 2, top + (TILE - tile.height) // 2))
        label = Image.new("RGB", (TILE, LINE), "white")  # longer text is cut off at its edge
        ImageDraw.Draw(label).text((0, 1), "\n".join(textwrap.wrap(text, 23)[:2]), "black", font, spacing=1)
        sheet.paste(label, (left, top + TILE))
    return sheet


def coloured(segmentation: npt.NDArray[np.integer]) -> Image.Image:
    """Returns a segmentation map [H, W] as a picture: a colour for each class number, white for -1."""
    picture = Image.fromarray((segmentation % len(_COLOURS)).astype(np.uint8)).convert("P")
    picture.putpalette([channel for colour in _COLOURS for channel in colour])
    return Image.composite(picture.convert("RGB"), Image.new("RGB", picture.size, "white"), Image.fromarray(segmentation >= 0))


_COLOURS = [tuple(round(127 + 120 * math.sin(2.4 * number + 2.1 * channel)) for channel in range(3)) for number in range(256)]
"""Colours of class numbers; hues are far apart for neighbouring numbers."""


def _as_colours(image: Image.Image | Bands) -> Image.Image:
    """Returns an RGB picture of the first three channels, or a grey one of the first channel if there are fewer."""
    if not isinstance(image, Bands):
        return image
    bands = [band.convert("L") for band in image.each]
    return Image.merge("RGB", bands[:3] if len(bands) >= 3 else bands[:1] * 3)
