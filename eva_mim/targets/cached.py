"""Targets from a store: no teacher is in memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from eva_mim.core.batches import MaskedBatch
from eva_mim.core.contracts import Features, Grid
from eva_mim.core.errors import UserError
from eva_mim.data.store.files import FeatureStore, hidden_places, unpacked
from eva_mim.students.heads import resampled
from eva_mim.targets import Cells, Target


class StoredTeacher:
    """What is known of a teacher whose features are stored; see `contracts.Teacher`."""

    def __init__(self, facts: Mapping[str, Any], summary_width: int):
        self._facts, self.summary_width = facts, summary_width
        self.image_size: int = facts["image_size"]
        self.grid: Grid = (facts["grid"][0], facts["grid"][1])
        self.width: int = facts["width"]
        self.mean, self.std = tuple(facts["mean"]), tuple(facts["std"])
        self.resizing: dict[str, Any] = {}

    def __call__(self, images: Tensor) -> Features:
        """Raises UserError: there is no network."""
        raise UserError("the teacher's features come from a cache, which has none of other images")

    def seen(self, grid: Grid) -> tuple[int, Grid]:
        """See `contracts.Teacher`."""
        return self.image_size, self.grid

    def to(self, device: Any) -> StoredTeacher:
        """Returns itself."""
        return self

    def fingerprint(self) -> str:
        """Returns the SHA-256 of the weights when the store was made."""
        return str(self._facts["sha256"])

    def facts(self) -> dict[str, Any]:
        """Returns the facts of the teacher when the store was made."""
        return {name: value for name, value in self._facts.items() if name != "sha256"}


def chosen(spatial: Tensor, grid: Grid, cells: Cells) -> Tensor:
    """Returns the features [M, C] of some cells, of spatial features [B, N, C] of a grid."""
    return (spatial if cells.grid is None else resampled(spatial, grid, cells.grid)).flatten(0, 1)[cells.places]


class CachedTargets:
    """Targets that came with the batch from a store; see `targets.Targets`."""

    def __init__(self, store: FeatureStore, teachers: Mapping[str, StoredTeacher]):
        """`teachers`: those of the store that teach, by name."""
        self.teachers = dict(teachers)
        self._bases = store.bases
        self._patches = {name: one.patches for name, one in store.facts.networks.items()}

    def __call__(self, batch: MaskedBatch, names: Collection[str] | None = None) -> dict[str, Features]:
        """See `targets.Targets`; the features are of the kind that live teachers give."""
        found = {}
        for name, one in self.teachers.items():
            if names is None or name in names:
                spatial = self._spatial(batch, name)
                spatial = spatial.view(batch.size, -1, spatial.shape[1])
                found[name] = Features(batch.stored[f"{name}.summary"], spatial, one.grid)
        return found

    def patches(self, batch: MaskedBatch, cells: Mapping[str, Cells]) -> dict[str, Target]:
        """See `targets.Targets`; only the features that are asked for are unpacked."""
        found = {}
        for name, one in cells.items():
            if one.grid is None:
                spatial = self._spatial(batch, name, one.places)
            else:
                features = self(batch, [name])[name]
                spatial = chosen(features.spatial, features.grid, one)
            found[name] = Target(spatial, batch.stored[f"{name}.summary"])
        return found

    def _spatial(self, batch: MaskedBatch, name: str, index: Tensor | None = None) -> Tensor:
        """Returns features [M, C] of the patches of `index` in the flattened [B * N], or of all."""
        spatial, scale = batch.stored[f"{name}.spatial"], batch.stored.get(f"{name}.scale")
        if index is not None and spatial.shape[1] < self._patches[name]:
            index = _rows_of_hidden(batch, spatial.shape[1])[index]
        flat = [each.flatten(0, 1) for each in (spatial, scale) if each is not None]
        exact = unpacked(*(flat if index is None else [each[index] for each in flat]))
        if name in self._bases:
            basis = self._bases[name] = self._bases[name].to(exact.device)
            exact = basis.up(exact)
        return exact


def _rows_of_hidden(batch: MaskedBatch, count: int) -> Tensor:
    """Returns for each patch of the flattened [B * N] its row among the stored ones [B * M]; 0 for patches that are seen."""
    assert batch.masked is not None
    places, there = hidden_places(batch.masked, count)
    rows = torch.arange(places.numel(), device=places.device).view_as(places) * there
    return torch.zeros_like(batch.masked, dtype=torch.int64).scatter_(1, places, rows).flatten()
