"""Mosaics: a teacher of a large fixed size sees several smaller images at once (RADIOv2.5, section on mosaic augmentation)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eva_mim.core.contracts import Features, Grid, Teacher


class MosaicTeacher:
    """A teacher whose input (the canvas) holds as many images as fit, each of the side at which its grid of patches is the
    student's. An image stands in the middle of its part of the canvas, the rest has the mean colour. It has patches alone, since
    one summary would be of all images."""

    def __init__(self, teacher: Teacher):
        self._teacher, self.image_size, self.grid = teacher, teacher.image_size, teacher.grid
        self.width, self.summary_width = teacher.width, 0
        self.mean, self.std, self.resizing = teacher.mean, teacher.std, teacher.resizing
        self._stride = teacher.image_size // teacher.grid[0]

    def seen(self, grid: Grid) -> tuple[int, Grid]:
        """See `contracts.Teacher`."""
        side = grid[0] * self._stride
        return (side, grid) if grid[0] == grid[1] and side <= self.image_size else (self.image_size, self.grid)

    def images_on(self, side: int) -> int:
        """Returns the number of images of this side on a canvas."""
        return (self.image_size // side) ** 2

    def __call__(self, images: Tensor) -> Features:
        """Returns the features of [B, channels, side, side] pixels; consecutive images share a canvas."""
        count, side, stride = len(images), images.shape[-1], self._stride
        across = self.image_size // side
        if across == 1 and side == self.image_size:
            return self._bare(self._teacher(images), count)
        cell, rows = self.image_size // across // stride * stride, side // stride
        fill = torch.tensor(self.mean, dtype=torch.float32, device=images.device) * 255
        fill = (fill if images.is_floating_point() else fill.round()).to(images.dtype).view(-1, 1, 1)
        many = self.images_on(side)
        canvases = -(-count // many)
        canvas = fill.expand(canvases, -1, self.image_size, self.image_size).clone()
        first = (cell - side) // 2 // stride * stride  # on the teacher's own grid
        places = [(row * cell + first, column * cell + first) for row in range(across) for column in range(across)]
        for number, (top, left) in enumerate(places):
            own = images[number::many]
            canvas[: len(own), :, top : top + side, left : left + side] = own
        maps = self._teacher(canvas).spatial.unflatten(1, self.grid)  # type: ignore[no-untyped-call]
        cut = [maps[:, top // stride : top // stride + rows, left // stride : left // stride + rows] for top, left in places]
        spatial = torch.stack(cut, dim=1).flatten(0, 1).flatten(1, 2)[:count]
        return Features(images.new_zeros(count, 0), spatial, (rows, rows))

    @staticmethod
    def _bare(features: Features, count: int) -> Features:
        return features._replace(summary=features.spatial.new_zeros(count, 0))

    def to(self, device: Any) -> MosaicTeacher:
        """Moves the weights to `device`."""
        self._teacher.to(device)
        return self

    def fingerprint(self) -> str:
        """Returns the fingerprint of the network."""
        return self._teacher.fingerprint()

    def facts(self) -> dict[str, Any]:
        """Returns the facts of the network, which has no summary here."""
        return self._teacher.facts() | {"mosaic": True, "summary": None}
