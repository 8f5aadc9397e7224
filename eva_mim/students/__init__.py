"""Networks under training. This file holds the settings; a student is imported when it is used."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

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
    patch_grad_scale: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    """Factor on the gradient of the patch embedding. EVA-02 uses 0.1 in masked pretraining (modeling_pretrain.py,
    stop_grad_conv1); EVA's classifiers freeze it (0)."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    def timm_options(self) -> dict[str, Any]:
        """Keyword arguments for `timm.create_model` that describe the architecture."""
        options = {"img_size": self.image_size, "patch_size": self.patch_size}
        return {name: value for name, value in options.items() if value is not None}


class InitSettings(Settings):
    """How a student starts when nothing seeds it."""

    law: Literal["timm", "eva01", "eva02", "mae"] = "timm"
    """"timm": the architecture's own. The others: `students/initialise.py` says what each does, with its source."""
    std: Annotated[float, Field(gt=0.0)] = 0.02
    """eva01 and eva02: standard deviation before truncation at one of it (EVA-01 g: 0.015)."""


class DecoderSettings(Settings):
    """The decoder of the visible form (MAE; EVA-L's is 512 wide with 4 blocks)."""

    width: int = Field(512, ge=1)
    depth: int = Field(4, ge=1)
    heads: int = Field(16, ge=1)

    @model_validator(mode="after")
    def _width_divides(self) -> DecoderSettings:
        for what, divisor in (("the sine-cosine positions", 4), ("its heads", self.heads)):
            if self.width % divisor:
                raise ValueError(f"student.decoder.width={self.width} must be a multiple of {divisor} for {what}")
        return self


class MaskedSettings(TrunkSettings):
    """A trunk that predicts the features of patches that it does not see."""

    form: Literal["mask_tokens", "visible"] = "mask_tokens"
    """"mask_tokens": the trunk sees mask tokens in place of hidden patches (EVA). "visible": it sees the visible patches
    alone and a small decoder predicts the rest (MAE, EVA-L)."""
    positions: Literal["learned", "sincos"] = "learned"
    """"sincos": fixed sine-cosine tables that are not trained (MAE, EVA-L)."""
    init: InitSettings = InitSettings()
    decoder: DecoderSettings = DecoderSettings()


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
