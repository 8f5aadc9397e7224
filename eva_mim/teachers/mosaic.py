"""Mosaics: a teacher of a large fixed size sees several smaller images at once (RADIOv2.5, section on mosaic augmentation)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eva_mim.core.contracts import Features, Grid, Teacher
from eva_mim.core.errors import UserError

if TYPE_CHECKING:
    from eva_mim.teachers import TeacherSettings


class MosaicTeacher:
    """A teacher whose input are k x k images of a smaller side each, in the middle of their parts of the canvas; the rest has the
    mean colour. It has patches alone, since one summary would be of all images."""

    def __init__(self, teacher: Teacher, settings: TeacherSettings):
        """Raises UserError for sides that do not fit."""
        assert settings.mosaic is not None
        self._teacher, self.images, side = teacher, settings.mosaic.images, settings.mosaic.side
        stride, cell = teacher.image_size // teacher.grid[0], teacher.image_size // self.images
        if side % stride or teacher.image_size % (self.images * stride) or side > cell:
            fit = cell // stride * stride
            raise UserError(f"{settings.path}.mosaic: {self.images} x {self.images} images of {side} px do not fit the "
                            f"{teacher.image_size} px of {settings.name}, in whole patches of {stride} px; the largest side "
                            f"is {fit}")
        self.image_size, self.grid = side, (side // stride, side // stride)
        self.width, self.summary_width = teacher.width, 0
        self.mean, self.std, self.resizing = teacher.mean, teacher.std, teacher.resizing
        self._cell, self._stride = cell, stride
        self._first = (cell - side) // 2 // stride * stride  # on the teacher's own grid

    def __call__(self, images: Tensor) -> Features:
        """Returns the features of [B, channels, side, side] pixels; consecutive images share a canvas."""
        count, many = len(images), self.images**2
        fill = torch.tensor(self.mean, dtype=torch.float32, device=images.device) * 255
        fill = (fill if images.is_floating_point() else fill.round()).to(images.dtype).view(-1, 1, 1)
        cells = fill.expand(-(-count // many) * many, -1, self._cell, self._cell).clone()
        place = slice(self._first, self._first + self.image_size)
        cells[:count, :, place, place] = images
        parts = cells.unflatten(0, (-1, self.images, self.images))  # type: ignore[no-untyped-call]
        canvas = parts.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        features = self._teacher(canvas)
        maps = features.spatial.unflatten(1, self._grids(features.grid))  # type: ignore[no-untyped-call]
        first, rows = self._first // self._stride, self.grid[0]
        own = maps.transpose(2, 3)[:, :, :, first : first + rows, first : first + rows]
        return Features(images.new_zeros(count, 0), own.flatten(0, 2).flatten(1, 2)[:count], self.grid)

    def _grids(self, grid: Grid) -> tuple[int, int, int, int]:
        rows = grid[0] // self.images
        return self.images, rows, self.images, rows

    def to(self, device: Any) -> MosaicTeacher:
        """Moves the weights to `device`."""
        self._teacher.to(device)
        return self

    def fingerprint(self) -> str:
        """Returns the fingerprint of the network."""
        return self._teacher.fingerprint()

    def facts(self) -> dict[str, Any]:
        """Returns the facts of the network, with the size and grid of one image and the number of images of a canvas."""
        own = {"image_size": self.image_size, "grid": list(self.grid), "mosaic": self.images, "summary": None}
        return self._teacher.facts() | own
