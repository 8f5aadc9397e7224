"""What shuffling shards as a whole and pool by pool costs and mixes: python tools/shuffle_cost.py [SHARDS RECORDS KB]

Computed from the orders, without files: shards that one loader process opens, and bytes between a read and the one before it in
the same process (a disk lays shards one behind another), for each 1,000 samples of its own; and from how many shards a batch
comes, which matters where each shard is of one class or web site. A block is read ahead as a whole when its first record is.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from eva_mim.core.contracts import Blocks
from eva_mim.data.sampler import GlobalOrder
from eva_mim.data.sources.shards import MAX_OPEN, cut_shards

WORKERS, BATCH = 8, 1024


class Cost(NamedTuple):
    """For each 1,000 samples of a process."""

    opened: float
    seeks: float
    """Reads that do not begin where the one before ended."""
    sought: float
    """Bytes between them."""
    shards: float
    """From which a batch of `BATCH` comes."""


def reads(order: npt.NDArray[np.int64], blocks: Blocks | None) -> Iterator[tuple[int, int]]:
    """(first, end) of the records that the disk reads: each alone, or its block when that is first met."""
    if blocks is None:
        yield from ((int(one), int(one) + 1) for one in order)
        return
    asked = OrderedDict[int, None]()
    for block in np.searchsorted(blocks.ends, order, side="right").tolist():
        if block not in asked:
            asked[block] = None
            yield int(blocks.ends[block - 1]) if block else 0, int(blocks.ends[block])
        while len(asked) > 2 * blocks.pooled:
            asked.popitem(last=False)


def cost(shards: int, records: int, size: int, pool: float, steps: int = 400) -> Cost:
    """Of the first `steps` batches, for the first of `WORKERS` processes that take turns with batches."""
    blocks = cut_shards([records * size] * shards, [records * (shard + 1) for shard in range(shards)], pool)
    order = GlobalOrder(shards * records, seed=0, global_batch=BATCH, micro_batch=BATCH, blocks=blocks)
    batches = [np.array([place.index for place in order.global_step(step)]) for step in range(steps)]
    own = np.concatenate(batches[::WORKERS])
    opened, held = 0, OrderedDict[int, None]()
    for shard in (own // records).tolist():
        opened += shard not in held
        held[shard] = held.pop(shard, None)
        while len(held) > MAX_OPEN:
            held.popitem(last=False)
    seeks = sought = last = 0
    for first, end in reads(own, blocks):
        seeks += first != last
        sought += abs(first - last) * size
        last = end
    thousands = len(own) / 1000
    mixed = float(np.mean([len(np.unique(batch // records)) for batch in batches]))
    return Cost(opened / thousands, seeks / thousands, sought / thousands, mixed)


def main() -> int:
    """A line for each size of pool."""
    shards, records, kilobytes = (int(text) for text in sys.argv[1:4]) if len(sys.argv) > 3 else (500, 10_000, 100)
    sys.stdout.write(f"{shards} shards of {records} records of {kilobytes} kB\n")
    for pool in (1, 8, 32, float("inf")):
        found = cost(shards, records, kilobytes * 1000, pool * 1e9)
        disk = f"{found.opened:6.1f} opens, {found.seeks:6.1f} seeks over {found.sought / 1e9:6.0f} GB for 1,000 samples"
        sys.stdout.write(f"pools of {pool:>3} GB: {disk}; a batch of {BATCH} is from {found.shards:.0f} shards\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
