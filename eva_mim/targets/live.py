"""Targets from frozen teachers that see each batch."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from eva_mim.core.contracts import Batch, Features, Teacher


class LiveTargets:
    """One teacher or several; each sees the view of its own size."""

    def __init__(self, teachers: Mapping[str, Teacher]):
        self.teachers = dict(teachers)

    def __call__(self, batch: Batch) -> dict[str, Features]:
        """Each teacher's features of the batch, by the teacher's name: summary [B, C], spatial [B, N, C]."""
        return {name: teacher(_view(batch, teacher.image_size)) for name, teacher in self.teachers.items()}


def _view(batch: Batch, side: int) -> Tensor:
    """[B, channels, side, side] pixels; the student's view where no view has that side."""
    other = batch.teacher_images
    return other if other is not None and batch.images.shape[-1] != side else batch.images
