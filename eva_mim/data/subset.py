"""Some records of a source, and several sources as one: limits, held-out shares, grouped classes, mixtures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from eva_mim.core.contracts import Blocks, Sample, Source
from eva_mim.core.errors import UserError
from eva_mim.core.settings import digest
from eva_mim.data.class_lists import known_as
from eva_mim.data.prompts import filled
from eva_mim.data.quarantine import Quarantined
from eva_mim.data.sampler import GlobalOrder, MixedOrder, MixedPart

Positions = npt.NDArray[np.int64]
NONE: Positions = np.empty(0, np.int64)
CHUNK = 2**16
"""Positions hashed at once."""


class Complement:
    """The first `count` integers from 0 that are not excluded; only the excluded integers are stored."""

    def __init__(self, count: int, few: Positions = NONE):
        """`few`: the excluded integers, in rising order."""
        self._count, self._before = count, few - np.arange(len(few))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: Any) -> Any:
        """Returns the integer at a position, or those at an array of positions."""
        return number + np.searchsorted(self._before, number, side="right")

    def below(self, bounds: Positions) -> Positions:
        """Returns the number of integers in this set that are below each bound."""
        few = self._before + np.arange(len(self._before))
        kept: Positions = np.minimum(bounds - np.searchsorted(few, bounds), self._count)
        return kept


class Subset:
    """Some records of a source, with classes grouped by `label_map` and renamed to `words`, if these are given."""

    def __init__(
        self,
        source: Source,
        indices: Complement | Positions,
        label_map: dict[str, list[str]] | None = None,
        words: tuple[str, ...] | None = None,
        quarantined: Mapping[int, str] = MappingProxyType({}),
        *,
        labels: Sequence[int] | None = None,
    ):
        """`indices`: positions in `source`. `quarantined`: position in `source` -> reason why it is not read. `labels`: one for
        each record of the subset, in place of the source's. Raises UserError if `label_map` or `words` do not fit the classes."""
        self.source, self._indices, self._quarantined = source, indices, dict(quarantined)
        self.classes = source.classes if label_map is None else tuple(label_map)
        self._labels = None if label_map is None else regroup(source.classes, label_map)
        self._own_labels = labels
        self._label_map = label_map
        if words is not None:
            if len(words) != len(self.classes or ()):
                raise UserError(f"data.class_names: {len(words)} names for {len(self.classes or ())} classes")
            self.classes = words

    @property
    def blocks(self) -> Blocks | None:
        """Blocks of the source, without records and blocks that are left out; None if the source has no blocks."""
        if self.source.blocks is None:
            return None
        ends, pooled = self.source.blocks
        kept = self._indices.below(ends) if isinstance(self._indices, Complement) else np.searchsorted(self._indices, ends)
        return Blocks(np.unique(kept[kept > 0]), pooled)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the source's fingerprint, the chosen records and their new labels; computed in a second for 14 million
        records."""
        labels = self._label_map if self._own_labels is None else self._own_labels
        return _fingerprint(self.source.fingerprint, self._indices, labels)

    def __len__(self) -> int:
        return len(self._indices)

    def key(self, index: int) -> str:
        return self.source.key(int(self._indices[index]))

    def prefetch(self, indices: Sequence[int]) -> None:
        positions = (int(self._indices[index]) for index in indices)
        self.source.prefetch([position for position in positions if position not in self._quarantined])

    def unlabelled(self) -> Sequence[int]:
        """Returns the positions of records without a label that are not in quarantine, in rising order."""
        if self._own_labels is not None:
            return ()
        places = np.array([place for place in self.source.unlabelled() if place not in self._quarantined], np.int64)
        if isinstance(self._indices, Complement):
            before, after = self._indices.below(places), self._indices.below(places + 1)
        else:
            before, after = (np.searchsorted(self._indices, places, side) for side in ("left", "right"))
        found: list[int] = before[before < after].tolist()
        return found

    def read(self, index: int) -> Sample:
        """Reads one record. Raises Quarantined for a record in quarantine, and the errors of the source."""
        position = int(self._indices[index])
        if position in self._quarantined:
            raise Quarantined(self._quarantined[position])
        sample = self.source.read(position)
        if self._own_labels is not None:
            return sample._replace(label=self._own_labels[index])
        if self._labels is not None and sample.label is not None:
            sample = sample._replace(label=self._labels[sample.label])
        return sample


def _fingerprint(source: str, indices: Complement | Positions, labels: Any) -> str:
    """Returns `digest([source, all indices as bytes in hex, labels])`, hashed in chunks: for 14 million indices the text has 224
    MB."""
    total = hashlib.sha256(f'["{source}", "'.encode())
    for start in range(0, len(indices), CHUNK):
        places = np.arange(start, min(start + CHUNK, len(indices)))
        total.update(np.asarray(indices[places], np.int64).tobytes().hex().encode())
    total.update(f'", {json.dumps(labels, sort_keys=True)}]'.encode())
    return total.hexdigest()


class Mixture:
    """Concatenation of sources under one range of indices. `parts`: size, weight and blocks of each source, for the training
    order.

    Labels are kept if all parts have the same classes. Otherwise they are dropped, and an image without captions gets one
    from each template, with the name of its class.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float], templates: Sequence[str]):
        self.parts = [MixedPart(len(source), weight, source.blocks) for source, weight in zip(sources, weights, strict=True)]
        self.classes = sources[0].classes if len({source.classes for source in sources}) == 1 else None
        self._sources, self._templates = sources, templates
        self._ends = np.cumsum([len(source) for source in sources])

    @property
    def blocks(self) -> None:
        """None; `parts` has the blocks of each source."""

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the parts' fingerprints."""
        return digest([source.fingerprint for source in self._sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def key(self, index: int) -> str:
        """Returns PART:KEY, with parts counted from 0."""
        part, inner = self._place(index)
        return f"{part}:{self._sources[part].key(inner)}"

    def prefetch(self, indices: Sequence[int]) -> None:
        places = [self._place(index) for index in indices]
        for part, source in enumerate(self._sources):
            source.prefetch([inner for other, inner in places if other == part])

    def unlabelled(self) -> Sequence[int]:
        """Returns the positions of records without a label, in rising order; none where the parts' labels are dropped."""
        if self.classes is None:
            return ()
        starts = [int(end) - len(source) for end, source in zip(self._ends, self._sources, strict=True)]
        return [start + place for start, source in zip(starts, self._sources, strict=True) for place in source.unlabelled()]

    def read(self, index: int) -> Sample:
        part, inner = self._place(index)
        sample, names = self._sources[part].read(inner)._replace(key=self.key(index)), self._sources[part].classes
        if self.classes is not None or names is None or sample.label is None:
            return sample
        named = tuple(filled(template, names[sample.label]) for template in self._templates)
        return sample._replace(label=None, captions=sample.captions or named)

    def _place(self, index: int) -> tuple[int, int]:
        part = int(np.searchsorted(self._ends, index, side="right"))
        return part, index - int(self._ends[part]) + len(self._sources[part])


def order_of(source: Source, **cut: Any) -> GlobalOrder:
    """Returns the order in which a source's records are trained on; `cut` are arguments of `GlobalOrder`."""
    if isinstance(source, Mixture):
        return MixedOrder(source.parts, **cut)
    return GlobalOrder(len(source), **cut, blocks=source.blocks)


def regroup(classes: tuple[str, ...] | None, label_map: dict[str, list[str]]) -> list[int]:
    """Returns the new label of each old label. Raises UserError unless every old class is in exactly one group."""
    if classes is None:
        raise UserError("data.label_map needs images with class names (data.classes, or class folders)")
    label = known_as(classes)
    groups = [[label.get(name, name) for name in group] for group in label_map.values()]
    named = [old for group in groups for old in group]
    unknown = sorted(old for old in named if isinstance(old, str))
    missing = [name for old, name in enumerate(classes) if old not in named]
    twice = sorted({classes[old] for old in named if isinstance(old, int) and named.count(old) > 1})
    if unknown or missing or twice:
        raise UserError(f"data.label_map: not classes of the data: {unknown}; left out: {missing}; named twice: {twice}")
    return [next(new for new, group in enumerate(groups) if old in group) for old in range(len(classes))]
