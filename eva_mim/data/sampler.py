"""The order of samples: one global permutation an epoch, cut into global batches, then into ranks' micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from eva_mim.config import UserError
from eva_mim.rng import derive


class Place(NamedTuple):
    """Which sample to read, and in which epoch: together with the run seed it decides everything about the view."""

    epoch: int
    index: int  # type: ignore[assignment]  # shadows tuple.index, which nobody wants here


class GlobalOrder:
    """Position in the data = steps done. The last, incomplete global batch of an epoch is left out.

    Of each global batch, micro-batch j of rank r is rows [(j * world + r) * micro, ...): whatever the number of ranks,
    a step sees the same samples.
    """

    def __init__(self, samples: int, *, seed: int, global_batch: int, micro_batch: int, rank: int = 0, world: int = 1):
        self.samples, self.seed = samples, seed
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.rank, self.world = rank, world
        if global_batch % (micro_batch * world):
            raise UserError(
                f"run.global_batch={global_batch} is not a multiple of run.micro_batch={micro_batch} x {world} processes"
            )
        self.steps_per_epoch = samples // global_batch
        if not self.steps_per_epoch:
            raise UserError(f"run.global_batch={global_batch} is more than the {samples} training images")
        self.micro_batches = global_batch // (micro_batch * world)
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def global_step(self, step: int) -> list[Place]:
        """All samples of a step, over all ranks."""
        epoch, within = divmod(step, self.steps_per_epoch)
        rows = self._permutation(epoch)[within * self.global_batch : (within + 1) * self.global_batch]
        return [Place(epoch, int(index)) for index in rows]

    def micro_steps(self, first: int, last: int) -> Iterator[list[Place]]:
        """This rank's micro-batches of steps first .. last - 1, in order."""
        for step in range(first, last):
            places = self.global_step(step)
            for micro in range(self.micro_batches):
                start = (micro * self.world + self.rank) * self.micro_batch
                yield places[start : start + self.micro_batch]

    def _permutation(self, epoch: int) -> npt.NDArray[np.int64]:
        if epoch != self._epoch:
            generator = np.random.default_rng(derive(self.seed, "order", epoch))
            self._epoch, self._order = epoch, generator.permutation(self.samples)
        return self._order
