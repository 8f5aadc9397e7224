"""Networks under training. This file holds the settings; a student is imported when it is used."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from eva_mim.config import Settings

Rate = Annotated[float, Field(ge=0.0, lt=1.0)]


class TrunkSettings(Settings):
    """The timm model inside every student."""

    name: str
    """timm's architecture name."""
    image_size: int | None = Field(None, ge=1)
    """Input side in pixels; default the architecture's own."""
    patch_size: int | None = Field(None, ge=1)
    """Patch side in pixels; default the architecture's own."""
    drop_path: Rate = 0.0
    """Stochastic depth: the last block's rate, rising linearly from 0 at the first."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    def timm_options(self) -> dict[str, Any]:
        """Keyword arguments for `timm.create_model` that describe the architecture."""
        options = {"img_size": self.image_size, "patch_size": self.patch_size}
        return {name: value for name, value in options.items() if value is not None}


class ClassifierSettings(TrunkSettings):
    """A trunk with a classification head."""

    global_pool: Literal["avg", "token"] = "avg"
    """How tokens become one vector: mean of the patches, or the class token."""


class TextSettings(Settings):
    """The text tower of a CLIP student."""

    init_from: str | None = None
    """Folder of an earlier clip stage, or an open_clip architecture name: size and weights come from there."""
    weights: str | None = None
    """With an open_clip architecture name: pretrained tag or local file."""
    width: int = Field(128, ge=1)
    layers: int = Field(2, ge=1)
    heads: int = Field(4, ge=1)
    context_length: int = Field(24, ge=3)
    """Longest caption in tokens, start and end included; longer ones are cut."""


class ClipSettings(TrunkSettings):
    """A timm image tower and a text tower that meet in one space."""

    embed_dim: int = Field(128, ge=1)
    """Width of the shared space."""
    pool: Literal["avg", "token", "map"] = "avg"
    """How the trunk's output becomes one vector (timm's `global_pool`)."""
    text: TextSettings = TextSettings()
