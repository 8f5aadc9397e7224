"""Cached features of a frozen network: computed once by all ranks, then read from files as batches of rows.

A folder below `index.cache_folder()` is named by a hash of everything that the features depend on, so its content is never
stale. Unused folders stay until the user removes them.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eva_mim.core.contracts import FeatureBatch, LabelledBatch
from eva_mim.core.distributed import all_reduce_sum, barrier, is_main, rank, world_size
from eva_mim.core.errors import UserError
from eva_mim.core.files import flush_folder, fsync, write_json
from eva_mim.core.log import Progress, say
from eva_mim.core.settings import digest
from eva_mim.data.sampler import GlobalOrder
from eva_mim.data.sources.index import cache_folder

ABANDONED = 3600
"""Seconds without a write after which incomplete features are attributed to a killed run and removed."""
COPY_ROWS = 4096
"""Rows copied at once when the ranks' files are joined."""
EVAL_ROWS = 1024
"""Rows of an evaluation batch."""

Positions = npt.NDArray[np.int64]


class Rows(NamedTuple):
    """Features of a source's readable images, in the source's order. The tensors are memory-mapped files, shared by all
    processes."""

    features: Tensor
    """[R, D] fp32."""
    labels: Tensor
    """[R] int64."""
    places: Tensor
    """[R] int64, position of each image in the source."""

    def batch(self, rows: Positions) -> FeatureBatch:
        """Returns the batch of the rows with these numbers [B]; for a GPU in pinned memory, so that no copy waits for it."""
        chosen = torch.from_numpy(rows)
        batch = FeatureBatch(self.places[chosen], self.features[chosen], self.labels[chosen])
        return batch.pin_memory() if torch.cuda.is_initialized() else batch  # type: ignore[no-untyped-call]


def cached_features(
    facts: dict[str, Any], batches: Iterable[LabelledBatch], features: Callable[[Tensor], Tensor], images: int,
    device: torch.device,
) -> Rows:
    """Returns `features` ([B, D] of a batch) of all `images`: from the folder for `facts` if it exists, else computed now.

    `facts` are all values that the features depend on; `batches` are this rank's share of the images. Every rank must call.
    Raises UserError if this rank cannot see rank 0's folder.
    """
    name = digest(facts)[:24]
    folder = cache_folder() / "features" / name
    # The main rank decides for all: another run may create the folder at any time.
    if not int(all_reduce_sum(torch.tensor(int(is_main() and folder.is_dir()), device=device))):
        number = int(all_reduce_sum(torch.tensor(os.getpid() if is_main() else 0, device=device)))
        temporary = folder.with_name(f"{name}.{number}.tmp")
        if is_main():
            _remove_abandoned(folder)
            temporary.mkdir(parents=True)
        barrier()
        _seen_by_all(temporary)
        _write_part(temporary, batches, features, images, device)
        barrier()
        if is_main():
            write_json(temporary / "facts.json", facts)
            _join(temporary)
            _rename(temporary, folder)
        barrier()
    _seen_by_all(folder)
    # "c" (copy on write): pages are read on access, and changes do not reach the file.
    rows = Rows(*(torch.from_numpy(np.load(folder / f"{kind}.npy", mmap_mode="c")) for kind in Rows._fields))
    count, width = rows.features.shape
    say(f"  features: {count} images x {width}, {count * width * 4 / 1e9:.3g} GB in {folder}")
    return rows


def _seen_by_all(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"rank {rank()} does not see {folder}, which rank 0 made; set EVA_MIM_CACHE to a folder that all "
                        "machines share")


def _write_part(
    folder: Path, batches: Iterable[LabelledBatch], features: Callable[[Tensor], Tensor], images: int, device: torch.device
) -> None:
    """Writes this rank's share of the features, in the order of the batches."""
    index, labels, width, progress = list[Tensor](), list[Tensor](), 0, Progress("features, images", images)
    with _part(folder, rank()).open("wb") as file:
        for batch in batches:
            rows = features(batch.images.to(device, non_blocking=True)).float().cpu().numpy()
            rows.tofile(file)
            index.append(batch.index)
            labels.append(batch.labels)
            width = rows.shape[1]
            progress.advance(len(rows) * world_size())
    torch.save((torch.cat(index), torch.cat(labels), width), _part(folder, rank()).with_suffix(".pt"))


def _join(folder: Path) -> None:
    """Joins the files of all ranks into one in the source's order and removes them; all that is left is flushed to disk."""
    parts = [_part(folder, number) for number in range(world_size())]
    index, labels, widths = zip(*(torch.load(part.with_suffix(".pt"), weights_only=True) for part in parts), strict=True)
    order = torch.cat(index).argsort()
    np.save(folder / "places.npy", torch.cat(index)[order].numpy())
    np.save(folder / "labels.npy", torch.cat(labels)[order].numpy())
    whole = np.lib.format.open_memmap(folder / "features.npy", "w+", np.float32, (len(order), widths[0]))  # type: ignore[no-untyped-call]
    places = torch.split(order.argsort(), [len(part) for part in index])
    for part, place in zip(parts, places, strict=True):
        rows = np.memmap(part, np.float32, "r", shape=(len(place), widths[0]))
        for start in range(0, len(place), COPY_ROWS):
            whole[place[start : start + COPY_ROWS].numpy()] = rows[start : start + COPY_ROWS]
    whole.flush()
    for part in parts:
        part.unlink()
        part.with_suffix(".pt").unlink()
    for file in folder.iterdir():
        fsync(file)
    flush_folder(folder)


def _part(folder: Path, number: int) -> Path:
    return folder / f"rank-{number:05d}.rows"


def _rename(temporary: Path, folder: Path) -> None:
    try:
        temporary.rename(folder)
    except OSError:  # another run made the same features meanwhile
        if not folder.is_dir():
            raise
        shutil.rmtree(temporary)


def _remove_abandoned(folder: Path) -> None:
    for old in folder.parent.glob(f"{folder.name}.*.tmp"):
        newest = max((file.stat().st_mtime for file in old.iterdir()), default=old.stat().st_mtime)
        if time.time() - newest > ABANDONED:
            shutil.rmtree(old)


class RowLoader:
    """Training batches of features; see `contracts.TrainData`. `chosen`: numbers of the rows that are used; an index of `order`
    is a position in `chosen`."""

    def __init__(self, rows: Rows, chosen: Positions, order: GlobalOrder, key: Callable[[int], str]):
        assert order.samples == len(chosen)
        self._rows, self._chosen, self._order, self.key = rows, chosen, order, key
        self.steps_per_epoch = order.steps_per_epoch

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
