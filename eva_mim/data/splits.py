"""Which records a run uses: the training and held-out sources, limits, held-out shares, grouped classes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from eva_mim.config import UserError, digest
from eva_mim.contracts import Sample, Source
from eva_mim.data import DataSettings
from eva_mim.registry import SOURCES, lookup
from eva_mim.rng import derive

HOLD_OUT_SEED = 0
"""The held-out share is the same for every run seed, so that runs can be compared."""


class Selected:
    """Some records of a source, with labels regrouped when a map is given."""

    def __init__(self, source: Source, indices: npt.ArrayLike, label_map: dict[str, list[str]] | None):
        self._source, self._indices = source, np.asarray(indices, dtype=np.int64)
        self.classes = source.classes if label_map is None else tuple(label_map)
        self._labels = None if label_map is None else regroup(source.classes, label_map)
        self.fingerprint = digest([source.fingerprint, self._indices.tobytes().hex(), label_map])

    def __len__(self) -> int:
        return len(self._indices)

    def key(self, index: int) -> str:
        return self._source.key(int(self._indices[index]))

    def read(self, index: int) -> Sample:
        sample = self._source.read(int(self._indices[index]))
        if self._labels is not None and sample.label is not None:
            sample = sample._replace(label=self._labels[sample.label])
        return sample


class Splits(NamedTuple):
    train: Source
    val: Source


def open_splits(settings: DataSettings) -> Splits:
    """Both sources. Raises UserError for a missing folder, an empty one, class lists that differ, or an unexpected number."""
    opener = lookup(SOURCES, settings.source, "data.source")
    train: Source = opener(settings, "train")
    val: Source | None = opener(settings, "val")
    train_indices = np.arange(len(train))
    if val is None:
        shuffled = np.random.default_rng(derive(HOLD_OUT_SEED, "hold-out")).permutation(len(train))
        held = max(1, round(settings.val_share * len(train)))
        val, val_indices, train_indices = train, np.sort(shuffled[:held]), np.sort(shuffled[held:])
    else:
        val_indices = np.arange(len(val))
    if settings.expected not in (None, len(train_indices)):
        raise UserError(
            f"data.expected: the recipe was written for {settings.expected} training images, but {settings.root} has "
            f"{len(train_indices)} after the held-out ones; its schedule counts epochs of them. To go on, set data.expected=null"
        )
    if train.classes != val.classes:
        raise UserError(f"the training split has classes {train.classes}, the held-out split {val.classes}")
    return Splits(
        Selected(train, train_indices[: settings.limit], settings.label_map),
        Selected(val, val_indices[: settings.val_limit], settings.label_map),
    )


def regroup(classes: tuple[str, ...] | None, label_map: dict[str, list[str]]) -> list[int]:
    """New label of each old one. Raises UserError unless every old class stands in exactly one group."""
    if classes is None:
        raise UserError("data.label_map needs images with class names (data.classes, or class folders)")
    named = [name for group in label_map.values() for name in group]
    unknown, missing = sorted(set(named) - set(classes)), sorted(set(classes) - set(named))
    twice = sorted({name for name in named if named.count(name) > 1})
    if unknown or missing or twice:
        raise UserError(f"data.label_map: not classes of the data: {unknown}; left out: {missing}; named twice: {twice}")
    return [next(new for new, group in enumerate(label_map.values()) if name in group) for name in classes]
