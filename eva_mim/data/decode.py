"""From the bytes of an image file to its pixels: the one place where images are decoded."""

from __future__ import annotations

import io
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from eva_mim.contracts import Sample
from eva_mim.phases import phase

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
"""Files that are images, in folders and in shards."""
MAX_FILE_BYTES = 2**30
"""A larger file is no picture; reading it would take the memory of every worker."""


class Raw(NamedTuple):
    """One record as it lies on the disk."""

    key: str
    content: bytes
    """Of the image file."""
    label: int | None = None
    captions: tuple[str, ...] = ()

    def sample(self) -> Sample:
        """The record with its image decoded. Raises what Pillow raises."""
        return Sample(self.key, decoded(self.content), self.label, self.captions)


def read_file(path: Path) -> bytes:
    """All of an image file. Raises ValueError for a huge one, OSError."""
    with phase("read"):
        if (size := path.stat().st_size) > MAX_FILE_BYTES:
            raise ValueError(f"{size} bytes are too many for an image")
        return path.read_bytes()


def decoded(content: bytes) -> Image.Image:
    """The picture as RGB. Raises what Pillow raises, also for decompression bombs (more than 179 million pixels)."""
    with phase("decode"), Image.open(io.BytesIO(content)) as image:
        pixels: Image.Image = image.convert("RGB")
    return pixels
