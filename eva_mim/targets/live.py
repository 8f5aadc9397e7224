"""Targets from frozen teachers, computed for each batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from eva_mim.core.batches import MaskedBatch
from eva_mim.core.contracts import Features, Teacher
from eva_mim.core.timing import phase
from eva_mim.targets import Cells, Target
from eva_mim.targets.cached import chosen


class LiveTargets:
    """Targets of one teacher or several; the input of each is the view of its own size."""

    def __init__(self, teachers: Mapping[str, Teacher], side: Callable[[str, int | None], int] | None = None):
        """`side`: function from a teacher's name and the side of a student's view to that of the teacher's; None: each teacher
        sees its own size."""
        self.teachers, self._side = dict(teachers), side

    def __call__(self, batch: MaskedBatch, names: Collection[str] | None = None) -> dict[str, Features]:
        """See `targets.Targets`."""
        found = {}
        for name, teacher in self.teachers.items():
            if names is None or name in names:
                with phase("teacher" if len(self.teachers) == 1 else f"teacher {name}"):
                    side = self._side(name, batch.side) if self._side else teacher.image_size
                    found[name] = teacher(batch.views[side])
        return found

    def patches(self, batch: MaskedBatch, cells: Mapping[str, Cells]) -> dict[str, Target]:
        """See `targets.Targets`."""
        found = self(batch, cells)
        return {name: Target(chosen(found[name].spatial, found[name].grid, one), found[name].summary)
                for name, one in cells.items()}
