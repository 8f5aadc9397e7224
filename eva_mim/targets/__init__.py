"""Targets of a student for a batch, by name. `live.py`: features of frozen teachers. `cached.py`: features from a store
(`data/store`). `normalise.py`: scales of different teachers. This file has the settings."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, Protocol

from pydantic import Field

from eva_mim.core.settings import For, Settings

if TYPE_CHECKING:
    from torch import Tensor

    from eva_mim.core.batches import MaskedBatch
    from eva_mim.core.contracts import Features, Grid, Teacher

KINDS = For("kind", "channel", "phi_s", "pca", "zca")


class TargetSettings(Settings):
    """Where the targets come from."""

    cached: Path | None = None
    """Folder that `eva-mim cache` made of this recipe: no teacher is in memory. null: the teachers compute them in each step."""


class NormaliserSettings(Settings):
    """Normalisation of a teacher's spatial features by running statistics, so that teachers of different scales weigh alike."""

    kind: Literal["none", "channel", "phi_s", "pca", "zca"] = "none"
    """"channel": each channel has mean 0 and standard deviation 1. "phi_s": a rotation and one factor, after which each channel
    has mean 0 and standard deviation 1, and an error has the same weight in every direction (PHI-S, Ranzinger et al. 2024).
    "pca", "zca": whitening, after which channels are also uncorrelated, in the principal directions or turned back as near to the
    features as that allows; an error weighs more where features vary little (the same paper compares them)."""
    steps: Annotated[int, Field(ge=1), KINDS] = 3000
    """Steps of training whose features are measured; afterwards the statistics are fixed (as RADIO's training has it)."""
    every: Annotated[int, Field(ge=1), KINDS] = 100
    """Steps between updates from the statistics, until these are fixed."""


class Target(NamedTuple):
    """What a student learns of a teacher in a batch."""

    spatial: Tensor
    """[M, C], features of the predicted patches."""
    summary: Tensor
    """[B, C'], see `Features`."""


class Cells(NamedTuple):
    """Which spatial features of a teacher are targets."""

    places: Tensor
    """Positions in the flattened [B * N]."""
    grid: Grid | None = None
    """Grid to which the features are brought before, by interpolation; None: the teacher's own."""


class Targets(Protocol):
    """Function that returns the features which a student learns to predict, for example those of live teachers."""

    teachers: Mapping[str, Teacher]

    def __call__(self, batch: MaskedBatch, names: Collection[str] | None = None) -> dict[str, Features]:
        """Returns the features of the batch by the teacher's name: of all, or of those in `names`."""

    def patches(self, batch: MaskedBatch, cells: Mapping[str, Cells]) -> dict[str, Target]:
        """Returns summary and spatial features of the teachers in `cells`, by name."""
