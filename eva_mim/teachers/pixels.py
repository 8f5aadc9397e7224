"""A teacher without a network: the target of a patch is its own pixels (MAE, He et al. 2021)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from eva_mim.core.contracts import Features, Grid
from eva_mim.core.errors import UserError
from eva_mim.core.settings import digest
from eva_mim.trunks.config import RESIZING
from eva_mim.trunks.pixels import normalise

if TYPE_CHECKING:
    from eva_mim.teachers import TeacherSettings

EPS = 1e-6
"""Added to a patch's variance (MAE's norm_pix_loss)."""


class PixelTeacher:
    """A teacher whose features are patches of p x p pixels: vectors of channels * p * p numbers, row by row, with the channels of
    a pixel side by side.

    Pixels are normalised with `mean` and `std`; then, with `normed`, each patch is normalised to mean 0 and (unbiased) variance 1
    over all its numbers, as in MAE. The summary is the mean patch.
    """

    def __init__(
        self, patch: int, image_size: int, normed: bool = True, mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, ...] = IMAGENET_DEFAULT_STD, *, follows: bool = False,
    ):
        """`follows`: True for a teacher that sees the images at whatever size its grid of patches is the student's."""
        self.mean, self.std = mean, std
        self.resizing: dict[str, Any] = dict(RESIZING)
        self.image_size, self.width, self._patch, self._normed = image_size, len(mean) * patch * patch, patch, normed
        self.summary_width, self._follows = self.width, follows
        self.grid: Grid = (image_size // patch, image_size // patch)

    def __call__(self, images: Tensor) -> Features:
        """Returns the features of [B, channels, S, S] pixels."""
        rows, columns = images.shape[-2] // self._patch, images.shape[-1] // self._patch
        cells = normalise(images, self.mean, self.std).reshape(len(images), -1, rows, self._patch, columns, self._patch)
        patches = cells.permute(0, 2, 4, 3, 5, 1).reshape(len(images), rows * columns, self.width)
        if self._normed:
            patches = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + EPS).sqrt()
        return Features(patches.mean(1), patches, (rows, columns))

    def seen(self, grid: Grid) -> tuple[int, Grid]:
        """See `contracts.Teacher`."""
        return (grid[0] * self._patch, grid) if self._follows else (self.image_size, self.grid)

    def to(self, device: Any) -> PixelTeacher:
        """Returns the teacher itself, which has no weights to move."""
        return self

    def fingerprint(self) -> str:
        """Returns the SHA-256 of `facts`, since there are no weights."""
        return digest(self.facts())

    def facts(self) -> dict[str, Any]:
        """Returns facts of the teacher in JSON's types; keys as in `FrozenTeacher.facts`."""
        return {
            "network": "pixels",
            "parameters": 0,
            "image_size": self.image_size,
            "grid": list(self.grid),
            "width": self.width,
            "mean": list(self.mean),
            "std": list(self.std),
            "layer": None,
            "blocks": None,
            "final_norm": self._normed,
            "project": False,
        }


def pixel_teacher(settings: TeacherSettings) -> PixelTeacher:
    """Returns a pixel teacher from a name such as "patch16" and an image size. Raises UserError."""
    match = re.fullmatch(r"patch([1-9]\d{0,3})", settings.name)
    if match is None:
        raise UserError(f"{settings.path}.name: {settings.name!r} does not say the patch side in pixels; write one such as "
                        "patch16")
    side = settings.side
    if side is None:
        raise UserError(f"{settings.path}.image_size: must be given for a teacher of pixels; set it to student.image_size")
    patch = int(match[1])
    if side % patch:
        raise UserError(f"{settings.path}.image_size: {side} px are no whole number of patches of {patch} px")
    mean, std = settings.mean or IMAGENET_DEFAULT_MEAN, settings.std or IMAGENET_DEFAULT_STD
    return PixelTeacher(patch, side, settings.final_norm, mean, std, follows=bool(settings.follows))
