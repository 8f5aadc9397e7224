"""Teachers of images whose channels differ from the network's input: the network gets some of the channels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eva_mim.core.contracts import Features, Grid, Teacher
from eva_mim.core.errors import UserError

if TYPE_CHECKING:
    from eva_mim.teachers import TeacherSettings


class BandTeacher:
    """A teacher whose input are the channels `bands` of the images, in this order."""

    def __init__(self, teacher: Teacher, bands: tuple[int, ...]):
        self._teacher, self.bands = teacher, bands
        self.image_size, self.grid = teacher.image_size, teacher.grid
        self.width, self.summary_width = teacher.width, teacher.summary_width
        self.mean, self.std, self.resizing = teacher.mean, teacher.std, teacher.resizing

    def __call__(self, images: Tensor) -> Features:
        """Returns the features of [B, channels, side, side] pixels."""
        # Slices are used because an index tensor would be copied to the device in every step.
        return self._teacher(torch.stack([images[:, band] for band in self.bands], dim=1))

    def seen(self, grid: Grid) -> tuple[int, Grid]:
        """See `contracts.Teacher`."""
        return self._teacher.seen(grid)

    def to(self, device: Any) -> BandTeacher:
        """Moves the weights to `device`."""
        self._teacher.to(device)
        return self

    def fingerprint(self) -> str:
        """Returns the fingerprint of the network."""
        return self._teacher.fingerprint()

    def facts(self) -> dict[str, Any]:
        """Returns the facts of the network, and its channels as `bands`."""
        return self._teacher.facts() | {"bands": list(self.bands)}


def with_bands(teacher: Teacher, settings: TeacherSettings, channels: int) -> Teacher:
    """Returns the teacher for images with `channels` channels. Raises UserError if `settings.bands` does not fit, or is missing
    and has no default."""
    own, bands = len(teacher.mean), settings.bands
    if bands is None and channels == own:
        return teacher
    if bands is None and (channels, own) == (1, 3):
        bands = (0, 0, 0)
    if bands is None:
        more = f", or give {settings.path}.mean and {settings.path}.std for all" if settings.kind == "pixels" else ""
        raise UserError(f"{settings.path}.bands: the images have {channels} channels and {settings.name} sees {own}; name those, "
                        f"counted from 0{more}")
    if len(bands) != own or max(bands) >= channels:
        raise UserError(f"{settings.path}.bands={list(bands)}: {settings.name} sees {own} channels, and those of the images are "
                        f"0 to {channels - 1}")
    return BandTeacher(teacher, bands)
