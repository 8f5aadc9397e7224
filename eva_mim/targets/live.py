"""Targets from frozen teachers, computed for each batch."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from eva_mim.core.contracts import Features, MaskedBatch, Teacher
from eva_mim.core.timing import phase
from eva_mim.targets import Cells, Target
from eva_mim.targets.cached import chosen


class LiveTargets:
    """Targets of one teacher or several; the input of each is the view of its own image size."""

    def __init__(self, teachers: Mapping[str, Teacher]):
        self.teachers = dict(teachers)

    def __call__(self, batch: MaskedBatch, names: Collection[str] | None = None) -> dict[str, Features]:
        """See `targets.Targets`."""
        found = {}
        for name, teacher in self.teachers.items():
            if names is None or name in names:
                with phase("teacher" if len(self.teachers) == 1 else f"teacher {name}"):
                    found[name] = teacher(batch.views[teacher.image_size])
        return found

    def patches(self, batch: MaskedBatch, cells: Mapping[str, Cells]) -> dict[str, Target]:
        """See `targets.Targets`."""
        found = self(batch, cells)
        return {name: Target(chosen(found[name].spatial, found[name].grid, one), found[name].summary)
                for name, one in cells.items()}
