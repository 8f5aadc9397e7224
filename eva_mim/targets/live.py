"""Targets from frozen teachers, computed for each batch."""

from __future__ import annotations

from collections.abc import Mapping

from eva_mim.core.contracts import Features, MaskedBatch, Teacher


class LiveTargets:
    """Targets of one teacher or several; the input of each is the view of its own image size."""

    def __init__(self, teachers: Mapping[str, Teacher]):
        self.teachers = dict(teachers)

    def __call__(self, batch: MaskedBatch) -> dict[str, Features]:
        """Returns each teacher's features of the batch by the teacher's name: summary [B, C], spatial [B, N, C]."""
        return {name: teacher(batch.views[teacher.image_size]) for name, teacher in self.teachers.items()}
