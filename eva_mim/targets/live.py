"""Targets from frozen teachers, computed for each batch."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from eva_mim.core.contracts import Features, MaskedBatch, Target, Teacher
from eva_mim.core.timing import phase


class LiveTargets:
    """Targets of one teacher or several; the input of each is the view of its own image size."""

    def __init__(self, teachers: Mapping[str, Teacher]):
        self.teachers = dict(teachers)

    def __call__(self, batch: MaskedBatch) -> dict[str, Features]:
        """Returns each teacher's features of the batch by the teacher's name: summary [B, C], spatial [B, N, C]."""
        found = {}
        for name, teacher in self.teachers.items():
            with phase("teacher" if len(self.teachers) == 1 else f"teacher {name}"):
                found[name] = teacher(batch.views[teacher.image_size])
        return found

    def patches(self, batch: MaskedBatch, index: Mapping[str, Tensor]) -> dict[str, Target]:
        """See `contracts.Targets`."""
        return {name: Target(features.spatial.flatten(0, 1)[index[name]], features.summary)
                for name, features in self(batch).items()}
