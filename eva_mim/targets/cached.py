"""Targets from a store: no teacher is in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from eva_mim.core.contracts import Features, Grid, MaskedBatch
from eva_mim.core.errors import UserError
from eva_mim.data.store.files import FeatureStore, hidden_places, unpacked


class StoredTeacher:
    """What is known of a teacher whose features are stored; see `contracts.Teacher`."""

    def __init__(self, facts: Mapping[str, Any]):
        self._facts = facts
        self.image_size: int = facts["image_size"]
        self.grid: Grid = (facts["grid"][0], facts["grid"][1])
        self.width: int = facts["width"]
        self.mean, self.std = tuple(facts["mean"]), tuple(facts["std"])
        self.resizing: dict[str, Any] = {}

    def __call__(self, images: Tensor) -> Features:
        """Raises UserError: there is no network."""
        raise UserError("the teacher's features come from a cache, which has none of other images")

    def to(self, device: Any) -> StoredTeacher:
        """Returns itself."""
        return self

    def fingerprint(self) -> str:
        """Returns the SHA-256 of the weights when the store was made."""
        return str(self._facts["sha256"])

    def facts(self) -> dict[str, Any]:
        """Returns the facts of the teacher when the store was made."""
        return {name: value for name, value in self._facts.items() if name != "sha256"}


class CachedTargets:
    """Targets that came with the batch from a store; see `contracts.Targets`."""

    def __init__(self, store: FeatureStore):
        self.teachers = {name: StoredTeacher(one.network) for name, one in store.facts.networks.items()}
        self._bases, self._hidden = store.bases, store.facts.splits["train"].hidden
        self._patches = {name: one.patches for name, one in store.facts.networks.items()}

    def __call__(self, batch: MaskedBatch) -> dict[str, Features]:
        """Returns each teacher's features of the batch by the teacher's name, of the kind that live teachers give; of a store of
        hidden patches zeros for those that are seen."""
        found = {}
        for name, teacher in self.teachers.items():
            spatial, scale, summary = (batch.stored.get(f"{name}.{kind}") for kind in ("spatial", "scale", "summary"))
            assert spatial is not None
            assert summary is not None
            exact = unpacked(spatial, scale)
            if name in self._bases:
                basis = self._bases[name] = self._bases[name].to(exact.device)
                exact = basis.up(exact)
            if self._hidden is not None and exact.shape[1] < self._patches[name]:
                assert batch.masked is not None
                places, there = hidden_places(batch.masked, self._hidden)
                whole = exact.new_zeros(len(exact), self._patches[name], exact.shape[2])
                exact = whole.scatter_(1, places[..., None].expand_as(exact), exact * there[..., None])
            found[name] = Features(summary, exact, teacher.grid)
        return found
