"""Targets of a student for a batch, by name. `live.py`: features of frozen teachers. `cached.py`: features from a store
(`data/store`). `normalise.py`: scales of different teachers. This file has the settings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from eva_mim.core.settings import For, Settings

KINDS = For("kind", "channel", "phi_s")


class NormaliserSettings(Settings):
    """Normalisation of a teacher's spatial features by running statistics, so that teachers of different scales weigh alike."""

    kind: Literal["none", "channel", "phi_s"] = "none"
    """"channel": each channel has mean 0 and standard deviation 1. "phi_s": a rotation and one factor, after which each channel
    has mean 0 and standard deviation 1, and an error has the same weight in every direction (PHI-S, Ranzinger et al. 2024)."""
    steps: Annotated[int, Field(ge=1), KINDS] = 3000
    """Steps of training whose features are measured; afterwards the statistics are fixed (as RADIO's training has it)."""
    every: Annotated[int, Field(ge=1), KINDS] = 100
    """Steps between updates from the statistics, until these are fixed."""
