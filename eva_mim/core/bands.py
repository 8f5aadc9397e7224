"""Pictures of other pixels than 8-bit RGB."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image, Resampling, Transpose


@dataclass(frozen=True)
class Bands:
    """A picture of other pixels than 8-bit RGB: a Pillow image for each channel, of one size and of mode "L", or "F" with values
    from 0 to 255. What is done to it, Pillow does to each."""

    each: tuple[Image, ...]

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        return self.each[0].size

    def crop(self, box: tuple[int, int, int, int]) -> Bands:
        """Crop of every band; this method and the next two are Pillow's."""
        return Bands(tuple(band.crop(box) for band in self.each))

    def resize(
        self, size: tuple[int, int], resample: Resampling, box: tuple[float, float, float, float] | None = None
    ) -> Bands:
        return Bands(tuple(band.resize(size, resample, box) for band in self.each))

    def transpose(self, method: Transpose) -> Bands:
        return Bands(tuple(band.transpose(method) for band in self.each))
