"""From a source to batches of a preparation. Broken records are replaced and reported."""

from __future__ import annotations

import atexit
import multiprocessing
import random
import signal
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Generic, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from eva_mim.core.contracts import B, Batch, Sample, Source
from eva_mim.core.distributed import rank, world_size
from eva_mim.core.errors import UserError
from eva_mim.core.log import say
from eva_mim.core.rng import derive
from eva_mim.data.preparation import Item, Preparation
from eva_mim.data.quarantine import Quarantined
from eva_mim.data.sampler import GlobalOrder, Place

REPLACEMENTS = 20
"""Other samples tried in place of a broken one before the run stops."""

MAX_NAMED = 100
"""Broken held-out images that are named, each once."""


class Failure(NamedTuple):
    """A reason to stop, on its way to the main process."""

    text: str


class Reader(Dataset["Item | str | Failure"], Generic[B]):
    """Place -> Item, with another record in place of a broken one in training. A broken held-out record -> its fault, "" where it
    is in quarantine."""

    def __init__(self, source: Source, preparation: Preparation[B]):
        self.source, self.preparation = source, preparation

    def __getitem__(self, place: Place) -> Item | str | Failure:
        try:
            return self._item(place)
        except UserError as error:  # raised in the main process: an exception in a worker leaves the worker behind
            return Failure(str(error))

    def __getitems__(self, places: list[Place]) -> list[Item | str | Failure]:
        """torch asks for a whole batch by this name."""
        try:
            self.source.prefetch([place.index for place in places])
        except UserError as error:
            return [Failure(str(error))]
        return [self[place] for place in places]

    def collate(self, read: list[Item | str | Failure]) -> B | Failure | list[str]:
        """A batch of the readable records. The faults alone when nothing was readable."""
        if failures := [item for item in read if isinstance(item, Failure)]:
            return failures[0]
        items = [item for item in read if isinstance(item, Item)]
        faults = [item for item in read if isinstance(item, str) and item]
        if not items:
            return faults
        index, broken = torch.tensor([item.index for item in items]), sum((item.broken for item in items), tuple(faults))
        return self.preparation.batch(index, [item.content for item in items], broken)

    def _item(self, place: Place) -> Item | str:
        sample, index, broken = self._read(place)
        if sample is None:
            return broken[0] if broken else ""
        return Item(index, self.preparation.content(sample, place._replace(index=index), self.source.classes), broken)

    def _read(self, place: Place) -> tuple[Sample | None, int, tuple[str, ...]]:
        index, broken, last = place.index, list[str](), ""
        others = self._others(place)
        for _ in range(REPLACEMENTS):
            try:
                sample = self.source.read(index)
                self.preparation.check(sample, self.source.classes)
                return sample, index, tuple(broken)
            except UserError:  # more than a record is lost
                raise
            except Quarantined as reason:  # was counted when the list was made
                last = f"{self.source.key(index)}: {reason}"
            except Exception as error:  # a record may be broken in any way; it is counted and named, never hidden
                last = f"{self.source.key(index)}: {type(error).__name__}: {error}"
                broken.append(last)
                last += _gone(error)
            if not self.preparation.training:
                return None, index, tuple(broken)
            index = next(others)
        raise UserError(f"{REPLACEMENTS} broken records in a row; the last: {last}")

    def _others(self, place: Place) -> Iterator[int]:
        rng = random.Random(derive(self.preparation.seed, "replacement", place.epoch, place.index))
        while True:
            yield rng.randrange(len(self.source))


def _gone(error: Exception) -> str:
    """Hint that names the highest missing folder above a missing file; empty otherwise."""
    parents = Path(error.filename).parents if isinstance(error, OSError) and error.filename else ()
    missing = [folder for folder in parents if not folder.exists()]
    return f"; {missing[-1]} does not exist: is its disk mounted?" if missing else ""


def _quiet_worker(worker: int) -> None:
    # Terminals and schedulers signal the whole process group; the main process alone decides when to stop. A worker whose
    # parent is gone ends by itself (torch watches for that).
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


@cache
def _reap_at_exit() -> None:
    # multiprocessing would wait at exit for workers that a failure left behind, and these ignore its SIGTERM.
    atexit.register(_reap)


def _reap() -> None:
    for child in multiprocessing.active_children():
        child.kill()


def _batches(
    reader: Reader[B], places: Sequence[list[Place]] | Iterator[list[Place]], workers: int
) -> Iterator[B | list[str]]:
    _reap_at_exit()
    loader: DataLoader[Item | str | Failure] = DataLoader(
        reader,
        batch_sampler=places,  # type: ignore[arg-type]  # torch's stub wants int indices; it passes on anything
        num_workers=workers,
        collate_fn=reader.collate,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_quiet_worker,
        pin_memory=torch.cuda.is_available(),
    )
    for batch in loader:
        if isinstance(batch, Failure):
            raise UserError(batch.text)
        yield batch


class TrainLoader(Generic[B]):
    """Training batches of this rank by step; see `contracts.TrainData`."""

    def __init__(self, source: Source, preparation: Preparation[B], order: GlobalOrder, workers: int):
        self._reader, self._order, self._workers = Reader(source, preparation), order, workers
        self.steps_per_epoch = order.steps_per_epoch

    def steps(self, first: int, last: int) -> Iterator[list[B]]:
        """Micro-batches of each step first .. last - 1. Steps run on through epochs: loading never pauses."""
        step: list[B] = []
        for batch in _batches(self._reader, self._order.micro_steps(first, last), self._workers):
            assert not isinstance(batch, list)  # a broken training image is replaced
            step.append(batch)
            if len(step) == self._order.micro_batches:
                yield step
                step = []

    def samples(self, step: int) -> list[dict[str, Any]]:
        """Epoch, index and key of each sample of a step, over all ranks."""
        return [place._asdict() | {"key": self.key(place.index)} for place in self._order.global_step(step)]

    def key(self, index: int) -> str:
        """The source's name of a sample."""
        return self._reader.source.key(index)


class EvalLoader(Generic[B]):
    """Every sample once over all ranks, in order, with fixed views and masks. Broken records are left out."""

    def __init__(self, source: Source, preparation: Preparation[B], batch: int, workers: int, limit: int | None = None):
        assert not preparation.training
        self._reader, self._batch, self._workers = Reader(source, preparation), batch, workers
        count = min(len(source), limit or len(source))
        if count < world_size():
            raise UserError(f"{count} held-out images are too few for {world_size()} processes")
        self._named: dict[str, None] = {}
        chosen = np.linspace(0, len(source) - 1, count).round().astype(int)  # spread: a folder is sorted by class
        self._indices = [int(index) for index in chosen[rank() :: world_size()]]

    def __iter__(self) -> Iterator[B]:
        starts = range(0, len(self._indices), self._batch)
        places = [[Place(0, index) for index in self._indices[start : start + self._batch]] for start in starts]
        whole, lost = False, 0
        for batch in _batches(self._reader, places, self._workers):
            faults = list(batch.broken) if isinstance(batch, Batch) else batch
            for fault in sorted(set(faults) - self._named.keys())[: max(0, MAX_NAMED - len(self._named))]:
                say(f"  broken held-out image left out: {fault}")
            self._named |= dict.fromkeys(faults)
            lost = 0 if isinstance(batch, Batch) else lost + len(batch)
            if lost >= REPLACEMENTS:
                raise UserError(f"{lost} broken held-out images in a row; the last: {faults[-1]}")
            if isinstance(batch, Batch):
                whole = True
                yield batch
        if not whole:
            raise UserError(f"none of {len(self._indices)} held-out images can be used; the first: "
                            f"{next(iter(self._named), 'in quarantine')}")
