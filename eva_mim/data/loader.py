"""Loaders of training and evaluation batches. Broken records are reported; in training they are replaced."""

from __future__ import annotations

import atexit
import errno
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeGuard

import torch
from torch.utils.data import DataLoader, Dataset

from eva_mim.core.batches import B, Batch
from eva_mim.core.contracts import Sample, Source
from eva_mim.core.distributed import rank, world_size
from eva_mim.core.errors import UserError
from eva_mim.core.log import say
from eva_mim.core.rng import derive
from eva_mim.data.preparation import Item, Preparation
from eva_mim.data.quarantine import Quarantined
from eva_mim.data.sampler import GlobalOrder, Place, evenly

REPLACEMENTS = 20
"""Number of broken records in a row at which the run stops; in training each is replaced by another sample."""

SHARED_MEMORY = "/dev/shm"
"""File system of the batches that loader processes hand over."""

MAX_NAMED = 100
"""Number of broken held-out images that are named in the log, each once."""


class Failure(NamedTuple):
    """Message of an error in a loader process, which the main process raises."""

    text: str


class Reader(Dataset["Item | str | Failure"], Generic[B]):
    """Dataset of items by place. In training a broken record is replaced by another one. In evaluation the item of a broken
    record is its fault as text, which is empty for a record in quarantine."""

    def __init__(self, source: Source, preparation: Preparation[B]):
        self.source, self.preparation = source, preparation

    def __getitem__(self, place: Place) -> Item | str | Failure:
        try:
            return self._item(place)
        except UserError as error:  # raised in the main process: after an exception in a worker, the worker would stay alive
            return Failure(str(error))

    def __getitems__(self, places: list[Place]) -> list[Item | str | Failure]:
        """Returns the items of a batch; torch's loader calls this method instead of `__getitem__`."""
        try:
            self.source.prefetch([place.index for place in places])
        except UserError as error:
            return [Failure(str(error))]
        return [self[place] for place in places]

    def collate(self, read: list[Item | str | Failure]) -> B | Failure | list[str]:
        """Returns a batch of the readable records; the list of faults if no record is readable; the Failure if there is one."""
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
                return self.preparation.decoded(sample, place._replace(index=index)), index, tuple(broken)
            except UserError:  # the error concerns more than one record
                raise
            except Quarantined as reason:  # counted when the list was made
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
    """Returns a hint that names the highest missing folder above a missing file; empty otherwise."""
    parents = Path(error.filename).parents if isinstance(error, OSError) and error.filename else ()
    missing = [folder for folder in parents if not folder.exists()]
    return f"; {missing[-1]} does not exist: is its disk mounted?" if missing else ""


STOPS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
"""Signals that terminals and schedulers send to the whole process group. The main process alone decides when to stop; a worker
whose parent is gone ends by itself (torch watches for that)."""


def _started(loader: DataLoader[Any]) -> Any:
    """Returns the iterator of a loader, whose workers start in it."""
    with _postponed(STOPS):
        return iter(loader)


@contextmanager
def _postponed(numbers: set[signal.Signals]) -> Iterator[None]:
    """In the block signals wait, and come at its end. They are blocked, since processes that start there have this one's handlers
    until they ignore them; and noted, since another thread may take them all the same, whereupon Python calls the handler in the
    main thread: an exception of it would leave half an iterator."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.signal(number, lambda number, _: came.append(number)) for number in numbers}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for one in came:
            signal.raise_signal(one)


def _begin_worker(reasons: Any, worker: int) -> None:
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    # multiprocessing prints a batch that cannot be sent and drops it; the main process would wait for it for ever.
    Queue._on_queue_feeder_error = staticmethod(partial(_cannot_send, reasons))  # type: ignore[attr-defined]


def _cannot_send(reasons: Any, error: Exception, batch: Any) -> None:
    """Ends a worker that cannot send a batch to the main process. `reasons` takes the message there. The exit code is 0, since
    torch raises an error for any other one wherever the main process is."""
    reasons.put(_why_not(error))
    os._exit(0)


def _why_not(error: Exception) -> str:
    """Returns what hinders a loader process from sending a batch, and the ways out."""
    text, without = str(error), "set data.workers=0"
    if "shared memory" in text or getattr(error, "errno", None) == errno.ENOSPC:
        try:
            room = shutil.disk_usage(SHARED_MEMORY)
        except OSError:
            return f"loader processes hand over batches in shared memory, and {text}; {without}"
        return (f"{SHARED_MEMORY} is full ({room.total / 1e6:.3g} MB in all, {room.free / 1e6:.3g} MB free), and loader "
                f"processes hand over batches there: enlarge it (docker run --shm-size=16g), or {without}")
    if "AF_UNIX" in text:
        folder = tempfile.gettempdir()
        return (f"TMPDIR={folder} is too long a path ({len(folder)} characters) for the sockets through which loader processes "
                f"hand over batches: set it to a shorter one, or {without}")
    return f"a loader process cannot hand over a batch ({type(error).__name__}: {text}); {without}"


@cache
def _reap_at_exit() -> None:
    # multiprocessing would wait at exit for workers that a failure left behind, and these ignore its SIGTERM.
    atexit.register(_reap)


def _reap() -> None:
    for child in multiprocessing.active_children():
        child.kill()


def load(
    reader: Reader[B], places: Sequence[list[Place]] | Iterator[list[Place]], workers: int
) -> Iterator[B | list[str]]:
    """Yields the batches of `places`, read by so many processes, in order; for a batch of which no image can be read its faults.
    Raises UserError for what concerns more than one record."""
    _reap_at_exit()
    reasons: Any = multiprocessing.SimpleQueue()
    loader: DataLoader[Item | str | Failure] = DataLoader(
        reader,
        batch_sampler=places,  # type: ignore[arg-type]  # torch's stub requires int indices; any object is accepted
        num_workers=workers,
        collate_fn=reader.collate,
        prefetch_factor=4 if workers else None,
        worker_init_fn=partial(_begin_worker, reasons),
        pin_memory=torch.cuda.is_initialized(),  # type: ignore[no-untyped-call]  # networks are on the GPU before batches are read
    )
    loaded = _started(loader)
    try:
        while True:
            try:
                batch = next(loaded)
            except StopIteration:
                return
            except RuntimeError:
                if reasons.empty():
                    raise
                raise UserError(reasons.get()) from None
            if isinstance(batch, Failure):
                raise UserError(batch.text)
            yield batch
    finally:
        # Its processes end now. An error's traceback would leave them to garbage collection, which closes their queues first, so
        # that torch waits 10 s for each.
        del loaded


class TrainLoader(Generic[B]):
    """Training batches of this rank by step; see `contracts.TrainData`."""

    def __init__(self, source: Source, preparation: Preparation[B], order: GlobalOrder, workers: int):
        self._reader, self._order, self._workers = Reader(source, preparation), order, workers
        self.steps_per_epoch, self.micro_batches = order.steps_per_epoch, order.micro_batches

    def steps(self, first: int, last: int) -> Iterator[list[B]]:
        """Yields the micro-batches of each step from `first` to `last` - 1. Loading continues across epochs without a pause."""
        step: list[B] = []
        for batch in load(self._reader, self._order.micro_steps(first, last), self._workers):
            assert not isinstance(batch, list)  # a broken training image is replaced
            step.append(batch)
            if len(step) == self._order.micro_batches:
                yield step
                step = []

    def samples(self, step: int) -> list[dict[str, Any]]:
        """Returns epoch, index and key of each sample of a step, over all ranks."""
        return [{"epoch": place.epoch, "index": place.index, "key": self.key(place.index)}
                for place in self._order.global_step(step)]

    def key(self, index: int) -> str:
        """Returns the source's key of a sample."""
        return self._reader.source.key(index)


class EvalLoader(Generic[B]):
    """Evaluation batches of this rank: each sample once over all ranks, in order, with fixed views and masks. Broken records are
    left out."""

    def __init__(self, source: Source, preparation: Preparation[B], batch: int, workers: int, limit: int | None = None):
        assert not preparation.training
        self._reader, self._batch, self._workers = Reader(source, preparation), batch, workers
        chosen = evenly(len(source), limit or len(source))
        if (count := len(chosen)) < world_size():
            raise UserError(f"{count} held-out images are too few for {world_size()} processes")
        self._indices = chosen[rank() :: world_size()]
        self._faults = Faults("held-out image")

    def __iter__(self) -> Iterator[B]:
        starts = range(0, len(self._indices), self._batch)
        places = [[Place(0, index) for index in self._indices[start : start + self._batch]] for start in starts]
        whole = False
        for batch in load(self._reader, places, self._workers):
            if self._faults.readable(batch):
                whole = True
                yield batch
        if not whole:
            raise UserError(f"none of {len(self._indices)} held-out images can be used; the first: {self._faults.first}")


class Faults:
    """Broken images that are left out: each is named once, up to a limit."""

    def __init__(self, what: str):
        self._what, self._lost = what, 0
        self._named: dict[str, None] = {}

    @property
    def first(self) -> str:
        """The first fault."""
        return next(iter(self._named), "in quarantine")

    def readable(self, batch: B | list[str]) -> TypeGuard[B]:
        """Names new faults; returns whether an image of the batch can be read. Raises UserError after many broken ones in a
        row."""
        faults = list(batch.broken) if isinstance(batch, Batch) else batch
        for fault in sorted(set(faults) - self._named.keys())[: max(0, MAX_NAMED - len(self._named))]:
            say(f"  broken {self._what} left out: {fault}")
        self._named |= dict.fromkeys(faults)
        self._lost = 0 if isinstance(batch, Batch) else self._lost + len(batch)
        if self._lost >= REPLACEMENTS:
            raise UserError(f"{self._lost} broken {self._what}s in a row; the last: {faults[-1]}")
        return isinstance(batch, Batch)
