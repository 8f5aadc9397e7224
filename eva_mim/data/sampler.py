"""Order of samples: one permutation an epoch, cut into global batches and then into the ranks' micro-batches; and the order of a
mixture of sources."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from eva_mim.core.contracts import Blocks
from eva_mim.core.errors import UserError
from eva_mim.core.rng import derive
from eva_mim.data.sources.index import Column, narrow

MAX_ROUND = 1_000_000
"""Maximum length of a round, after which the turns of a mixture's parts repeat; the turns of one round are held in memory."""


class Place(NamedTuple):
    """Epoch and index of a sample, which together with the run's seed determine its view."""

    epoch: int
    index: int  # type: ignore[assignment]  # shadows tuple.index
    group: int = 0
    """Number of the group of teachers to which the sample belongs in its step."""
    step: int = 0
    """The data step; with the run's seed and the group it determines a size that is drawn."""


class GroupBatch(NamedTuple):
    """Part of each step that one group of teachers teaches: consecutive samples."""

    name: str
    batch: int
    """Images over all processes."""
    micro_batch: int | None = None
    """Images of a forward pass of one process; None: all of a process."""
    ranks: int | None = None
    """Number of processes that run this group alone; None: every process runs all groups, one after the other, as a single
    process always does."""


class Piece(NamedTuple):
    """A micro-batch of a rank: consecutive samples of a step."""

    first: int
    last: int
    """Position after the last one."""
    group: int = 0


def permuted(samples: int, generator: np.random.Generator, blocks: Blocks | None) -> Column:
    """Returns a permutation of 0 .. samples - 1: of all records, or with `blocks`, pool after pool of randomly chosen blocks,
    with the records of a pool shuffled together."""
    if blocks is None:
        return narrow(generator.permutation(samples))
    starts = np.concatenate([[0], blocks.ends[:-1]])
    drawn = generator.permutation(len(blocks.ends))
    pools = np.array_split(drawn, math.ceil(len(drawn) / blocks.pooled))  # about equal sizes: a small pool mixes badly
    order, done = np.empty(samples, narrow(blocks.ends).dtype), 0
    for pool in pools:
        records = np.concatenate([np.arange(starts[block], blocks.ends[block]) for block in pool])
        order[done : done + len(records)] = generator.permutation(records)
        done += len(records)
    assert done == samples
    return order


def evenly(images: int, limit: int) -> list[int]:
    """Returns the positions of at most `limit` images, evenly spread, since a folder is sorted by class."""
    found: list[int] = np.linspace(0, images - 1, min(images, limit)).round().astype(int).tolist()
    return found


def cut_batch(global_batch: int, micro_batch: int | None, world: int) -> tuple[int, int]:
    """Returns (images of a micro-batch, micro-batches of a step) for each of `world` processes; without `micro_batch` a step is
    one. Raises UserError, with the nearest sizes that would do, for a batch that cannot be cut so."""
    return _cut(global_batch, micro_batch, world, "run.global_batch", "run.micro_batch")


def _cut(batch: int, micro_batch: int | None, world: int, setting: str, micro_setting: str) -> tuple[int, int]:
    unit = (micro_batch or 1) * world
    if batch % unit:
        below = batch // unit * unit
        ways = [f"{setting}={near}" for near in (below, below + unit) if near]
        if micro_batch and not batch % world:
            own = batch // world
            ways.append(f"{micro_setting}={max(size for size in range(1, min(own, micro_batch) + 1) if not own % size)}")
        by = f"{micro_setting}={micro_batch} x {world} processes = {unit}" if micro_batch else f"{world} processes"
        raise UserError(f"{setting}={batch} is not a multiple of {by}; nearest: {' or '.join(ways)}")
    micro = micro_batch or batch // world
    return micro, batch // (micro * world)


def cut_alike(global_batch: int, micro_batch: int | None, rank: int, world: int) -> list[Piece]:
    """Returns the micro-batches of a rank in each step without groups. Raises UserError as `cut_batch`."""
    micro, count = cut_batch(global_batch, micro_batch, world)
    starts = [(turn * world + rank) * micro for turn in range(count)]
    return [Piece(start, start + micro) for start in starts]


def cut_groups(groups: Sequence[GroupBatch], rank: int, world: int) -> list[Piece]:
    """Returns the micro-batches of a rank in each step, as many for every rank. The groups' samples follow one another. Raises
    UserError for groups that do not fit the processes."""
    given = [group.ranks for group in groups if group.ranks is not None] if world > 1 else []
    if given and (len(given) < len(groups) or sum(given) != world):
        said = ", ".join(f"groups.{group.name}.ranks={group.ranks if group.ranks else 'null'}" for group in groups)
        raise UserError(f"{said}: they must add up to the {world} processes, or all be null, so that every process runs all "
                        "groups")
    pieces, counts, first, before = list[Piece](), dict[str, int](), 0, 0
    for number, group in enumerate(groups):
        ranks, own = (group.ranks, rank - before) if given and group.ranks else (world, rank)
        path = f"groups.{group.name}"
        micro, counts[path] = _cut(group.batch, group.micro_batch, ranks, f"{path}.batch", f"{path}.micro_batch")
        if 0 <= own < ranks:
            starts = [first + (turn * ranks + own) * micro for turn in range(counts[path])]
            pieces += [Piece(start, start + micro, number) for start in starts]
        first, before = first + group.batch, before + (group.ranks or 0)
    if given and len(set(counts.values())) > 1:
        said = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise UserError(f"a step would be another number of forward passes on each process: {said}; set micro_batch of the "
                        "groups, so that batch / (ranks x micro_batch) is the same")
    return pieces


class GlobalOrder:
    """Order of the samples of all steps; a position in the data is a step. The last, incomplete global batch of an epoch is
    left out.

    Micro-batch j of rank r is rows [(j * world + r) * micro, ...) of the global batch, so the samples of a step do not
    depend on the number of ranks; the same holds for the rows of a group (`cut_groups`).
    """

    def __init__(
        self, samples: int, *, seed: int, global_batch: int, micro_batch: int | None, rank: int = 0, world: int = 1,
        blocks: Blocks | None = None, groups: Sequence[GroupBatch] = (),
    ):
        self.samples, self.seed, self.blocks = samples, seed, blocks
        self.global_batch = global_batch
        self._pieces = cut_groups(groups, rank, world) if groups else cut_alike(global_batch, micro_batch, rank, world)
        self.micro_batches = len(self._pieces)
        self.steps_per_epoch = samples // global_batch
        if not self.steps_per_epoch:
            raise UserError(f"run.global_batch={global_batch} is more than the {samples} training images")
        self._epoch, self._order = -1, np.empty(0, dtype=np.uint32)

    def global_step(self, step: int) -> list[Place]:
        """Returns all samples of a step, over all ranks."""
        epoch, within = divmod(step, self.steps_per_epoch)
        rows = self._permutation(epoch)[within * self.global_batch : (within + 1) * self.global_batch]
        return [Place(epoch, int(index), step=step) for index in rows]

    def micro_steps(self, first: int, last: int) -> Iterator[list[Place]]:
        """Yields this rank's micro-batches of the steps from `first` to `last` - 1, in order."""
        for step in range(first, last):
            places = self.global_step(step)
            for piece in self._pieces:
                rows = places[piece.first : piece.last]
                yield [place._replace(group=piece.group) for place in rows] if piece.group else rows

    def _permutation(self, epoch: int) -> Column:
        if epoch != self._epoch:
            generator = np.random.default_rng(derive(self.seed, "order", epoch))
            self._epoch, self._order = epoch, permuted(self.samples, generator, self.blocks)
        return self._order


class MixedPart(NamedTuple):
    """Number of images, weight and blocks of one source of a mixture."""

    images: int
    weight: float
    blocks: Blocks | None = None


class MixedOrder(GlobalOrder):
    """Order of a mixture: the parts take turns by their weights, and each part is permuted anew for every pass over its
    images.

    Indices count the images of all parts, one part after another. The turns repeat after a round of as many positions as the
    sum of the integer weights, so the position alone determines the part, its pass, and the place within the pass.
    `Place.epoch` is the pass. An epoch of the mixture has as many images as all parts together; passes do not restart with
    it, and no image is left out at its end.
    """

    def __init__(
        self, parts: Sequence[MixedPart], *, seed: int, global_batch: int, micro_batch: int | None, rank: int = 0, world: int = 1,
        groups: Sequence[GroupBatch] = (),
    ):
        self._parts, self._sizes = parts, np.array([part.images for part in parts])
        super().__init__(
            int(self._sizes.sum()), seed=seed, global_batch=global_batch, micro_batch=micro_batch, rank=rank, world=world,
            groups=groups,
        )
        self._offsets = np.cumsum(self._sizes) - self._sizes
        self._weights = np.array(whole_weights([part.weight for part in parts]))
        self._turns = take_turns(self._weights)
        turns = np.eye(len(parts), dtype=np.int64)[self._turns]
        self._turns_before = (np.cumsum(turns, axis=0) - turns)[np.arange(len(turns)), self._turns]
        self._orders: dict[int, tuple[int, Column]] = {}

    def global_step(self, step: int) -> list[Place]:
        """Returns all samples of a step, over all ranks."""
        rounds, turn = np.divmod(np.arange(step * self.global_batch, (step + 1) * self.global_batch), len(self._turns))
        part = self._turns[turn]
        passes, place = np.divmod(rounds * self._weights[part] + self._turns_before[turn], self._sizes[part])
        return [Place(e, int(self._offsets[p] + self._pass(p, e)[i]), step=step)
                for p, e, i in zip(part.tolist(), passes.tolist(), place.tolist(), strict=True)]

    def _pass(self, part: int, number: int) -> Column:
        if self._orders.get(part, (-1,))[0] != number:
            generator = np.random.default_rng(derive(self.seed, "part-order", part, number))
            self._orders[part] = number, permuted(self._parts[part].images, generator, self._parts[part].blocks)
        return self._orders[part][1]


def whole_weights(weights: Sequence[float]) -> list[int]:
    """Returns the smallest integers in exactly the proportions of the weights, each weight taken by its decimal digits. Raises
    UserError if their sum exceeds MAX_ROUND."""
    exact = [Fraction(str(weight)) for weight in weights]
    scaled = [int(weight * math.lcm(*(other.denominator for other in exact))) for weight in exact]
    whole = [weight // math.gcd(*scaled) for weight in scaled]
    if sum(whole) > MAX_ROUND:
        written = ", ".join(map(str, weights))
        raise UserError(f"data.mixture: turns by the weights {written} repeat after {sum(whole)} images only; round the weights")
    return whole


def take_turns(weights: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Returns the part at each position of a round, [sum of weights] int64: each part as often as its weight, spread evenly."""
    count = np.asarray(weights)
    part = np.repeat(np.arange(len(count)), count)
    number = np.arange(len(part)) - np.repeat(np.cumsum(count) - count, count)
    return part[np.lexsort((part, (number + 0.5) / count[part]))]
