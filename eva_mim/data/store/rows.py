"""Stored summaries as batches of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eva_mim.core.batches import FeatureBatch
from eva_mim.core.distributed import rank, world_size
from eva_mim.data.sampler import GlobalOrder
from eva_mim.data.store.files import FeatureStore

EVAL_ROWS = 1024
"""Rows of an evaluation batch."""

Positions = npt.NDArray[np.int64]


class Stacked:
    """Rows of several tensors as those of one [R, D]; they are read when they are asked for."""

    def __init__(self, parts: Sequence[Tensor], chosen: Tensor):
        """`parts`: [S, D] each, the last one perhaps shorter; `chosen`: [R] int64, numbers of rows over all parts."""
        self._parts, self._chosen = parts, chosen
        self.shape = (len(chosen), parts[0].shape[1])

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, which: Tensor | slice) -> Tensor:
        """Returns the rows with these numbers [B, D]."""
        rows, size = self._chosen[which], len(self._parts[0])
        rising, order = rows.sort()
        numbers, counts = torch.unique_consecutive(rising // size, return_counts=True)
        found = torch.empty(len(rows), self.shape[1], dtype=self._parts[0].dtype)
        places, wanted = (torch.split(each, counts.tolist()) for each in (found, rising % size))
        for number, place, inner in zip(numbers.tolist(), places, wanted, strict=True):
            torch.index_select(self._parts[number], 0, inner, out=place)
        return torch.empty_like(found).index_copy_(0, order, found)

    def share(self, first: int, step: int) -> Stacked:
        """Returns every `step`-th row from the `first`."""
        return Stacked(self._parts, self._chosen[first::step])


class Rows(NamedTuple):
    """Summaries of a source's readable images, in the source's order."""

    features: Stacked
    """[R, D] fp32."""
    labels: Tensor
    """[R] int64; 0 of a store without labels."""
    places: Tensor
    """[R] int64, position of each image in the source."""

    @classmethod
    def of(cls, store: FeatureStore, split: str, network: str) -> Rows:
        """Returns the rows of a split whose images are all stored, with their labels if it has any."""
        files = store.mapped(split)
        places = torch.cat([file["present"] for file in files]).nonzero()[:, 0]
        labels = torch.cat([file["label"] for file in files])[places] if "label" in files[0] else torch.zeros_like(places)
        return cls(Stacked([file[f"{network}.summary"] for file in files], places), labels, places)

    def share(self) -> Rows:
        """Returns this rank's rows."""
        first, step = rank(), world_size()
        return Rows(self.features.share(first, step), self.labels[first::step], self.places[first::step])

    def batch(self, rows: Positions) -> FeatureBatch:
        """Returns the batch of the rows with these numbers [B]; for a GPU in pinned memory, so that no copy waits for it."""
        chosen = torch.from_numpy(rows)
        batch = FeatureBatch(self.places[chosen], self.features[chosen], self.labels[chosen])
        return batch.pin_memory() if torch.cuda.is_initialized() else batch  # type: ignore[no-untyped-call]


class RowLoader:
    """Training batches of features; see `contracts.TrainData`. `chosen`: numbers of the rows that are used; an index of `order`
    is a position in `chosen`."""

    def __init__(self, rows: Rows, chosen: Positions, order: GlobalOrder, key: Callable[[int], str]):
        assert order.samples == len(chosen)
        self._rows, self._chosen, self._order, self.key = rows, chosen, order, key
        self.steps_per_epoch, self.micro_batches = order.steps_per_epoch, order.micro_batches

    def steps(self, first: int, last: int) -> Iterator[list[FeatureBatch]]:
        """Yields the micro-batches of each step from `first` to `last` - 1."""
        step: list[FeatureBatch] = []
        for places in self._order.micro_steps(first, last):
            step.append(self._rows.batch(self._chosen[[place.index for place in places]]))
            if len(step) == self._order.micro_batches:
                yield step
                step = []

    def samples(self, step: int) -> list[dict[str, Any]]:
        """Returns epoch, index and key of each sample of a step, over all ranks."""
        found = []
        for place in self._order.global_step(step):
            index = int(self._rows.places[self._chosen[place.index]])
            found.append({"epoch": place.epoch, "index": index, "key": self.key(index)})
        return found


class EvalRows:
    """Evaluation batches of features: each chosen row once over all ranks, in order."""

    def __init__(self, rows: Rows, chosen: Positions):
        self._rows, self._own = rows, chosen[rank() :: world_size()]

    def __iter__(self) -> Iterator[FeatureBatch]:
        for start in range(0, len(self._own), EVAL_ROWS):
            yield self._rows.batch(self._own[start : start + EVAL_ROWS])
