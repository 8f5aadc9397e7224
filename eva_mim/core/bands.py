"""Images with pixels other than 8-bit RGB."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image, Resampling, Transpose


@dataclass(frozen=True)
class Bands:
    """An image with pixels other than 8-bit RGB: one Pillow image per channel, all of one size, of mode "L" or of mode "F" with
    values from 0 to 255. Each method applies Pillow's method of that name to every channel."""

    each: tuple[Image, ...]

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.each[0].size

    def crop(self, box: tuple[int, int, int, int]) -> Bands:
        """Returns the image with every channel cropped to `box` (left, top, right, bottom)."""
        return Bands(tuple(band.crop(box) for band in self.each))

    def resize(
        self, size: tuple[int, int], resample: Resampling, box: tuple[float, float, float, float] | None = None
    ) -> Bands:
        return Bands(tuple(band.resize(size, resample, box) for band in self.each))

    def transpose(self, method: Transpose) -> Bands:
        return Bands(tuple(band.transpose(method) for band in self.each))
