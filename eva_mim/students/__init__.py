"""Networks under training: settings. A student is imported when it is used."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from eva_mim.core.run_folder import CLIP_WEIGHTS
from eva_mim.core.settings import For, Settings
from eva_mim.trunks import Rate, TrunkSettings

MAX_LOGIT_SCALE = math.log(100)
"""CLIP (Radford et al. 2021, section 2.5) and EVA-CLIP clip the learned temperature here."""


class InitSettings(Settings):
    """Initialisation of a student without `init_from`."""

    law: Literal["timm", "eva01", "eva02", "mae"] = "timm"
    """"timm": the architecture's own. The others: `students/initialise.py` says what each does, with its source."""
    std: Annotated[float, Field(gt=0.0), For("law", "eva01", "eva02")] = 0.02
    """Standard deviation before truncation at one of it (EVA-01 g: 0.015)."""


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
    head: str = "linear"
    """What predicts a target from a patch: a kind of `HEADS` (`core/registry.py`)."""
    decoder: Annotated[DecoderSettings, For("form", "visible")] = DecoderSettings()


class ClassifierSettings(TrunkSettings):
    """A trunk with a classification head."""

    global_pool: Literal["avg", "token"] = "avg"
    """How tokens become one vector: mean of the patches, or the class token."""
    head_scale: Annotated[float, Field(gt=0.0, le=1.0)] = 0.001
    """Factor on a new head's weights (EVA-01/eva/modeling_finetune.py, init_scale): training starts at uniform odds."""
    head_rows: Literal["new", "all", "shared"] = "new"
    """What a head for other classes than those of `init_from` starts from. "new": nothing. "all": the rows of the same classes,
    each of which must be there. "shared": these rows where there are any, the other ones are new."""
    head_classes: str | None = None
    """Classes of the head of `init_from`, where it does not say: a layout or whatever else `eva-mim labels` reads."""

    @model_validator(mode="after")
    def _classes_are_for_rows(self) -> ClassifierSettings:
        if self.head_classes is not None and self.head_rows == "new":
            raise ValueError("student.head_classes is of use with student.head_rows=all or shared only")
        return self


class ProbeSettings(Settings):
    """Training of a linear probe."""

    cached: bool = False
    """Features of all images are computed once, with the held-out view, and kept below $EVA_MIM_CACHE (~/.cache/eva-mim): seconds
    an epoch, but no crop or mirror. Otherwise every step sends images through the trunk (EVA's own probe)."""
    lrs: Annotated[tuple[Annotated[float, Field(gt=0.0)], ...], Field(min_length=1)] | None = None
    """Peak learning rates, in place of `optim.lr`: a layer for each learns from the same features, the best is the result. The
    schedule has the same form for all, and ends at the same share of the peak."""
    select: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of the training images that the best of several `lrs` is chosen on; none of the layers learns from them."""

    @model_validator(mode="after")
    def _rates_have_names(self) -> ProbeSettings:
        names = [f"{lr:g}" for lr in self.lrs or ()]
        if len(set(names)) < len(names):
            raise ValueError(f"probe.lrs={list(self.lrs or ())}: two are the same to six digits")
        return self


class TextSettings(Settings):
    """The text tower of a CLIP student."""

    init_from: str | None = None
    """Folder of an earlier clip stage, or an open_clip architecture name: size and weights come from there."""
    weights: str | None = None
    """With an open_clip architecture name: pretrained tag or local file. Without, the architecture alone is taken."""
    width: int | None = Field(None, ge=1)
    """Default 128; with `init_from` the source's, and it can be no other. `layers` (2) and `heads` (4) likewise."""
    layers: int | None = Field(None, ge=1)
    heads: int | None = Field(None, ge=1)
    context_length: int | None = Field(None, ge=3)
    """Longest caption in tokens, start and end included; longer ones are cut. Default 24, or the source's. Positions for fewer
    tokens are the source's first ones, for more they are interpolated as open_clip does."""
    projection: Literal["new", "reused"] | None = None
    """The source's projection into the shared space; default reused where the text tower is locked, else new (EVA-CLIP)."""
    quick_gelu: bool | None = None
    """OpenAI's approximation of GELU; default as the source. EVA-CLIP takes exact GELU with OpenAI's weights as well."""

    @model_validator(mode="after")
    def _weights_have_an_architecture(self) -> TextSettings:
        if self.weights is not None and self.init_from is None:
            raise ValueError(f"student.text.weights={self.weights} needs the architecture's name in student.text.init_from")
        return self


class ClipSettings(TrunkSettings):
    """A timm image tower and a text tower that meet in one space."""

    embed_dim: int = Field(128, ge=1)
    """Width of the shared space."""
    pool: Literal["avg", "token", "map"] = "avg"
    """How the trunk's output becomes one vector (timm's `global_pool`)."""
    proj_bias: bool = False
    """The image tower's projection into the shared space has a bias (EVA-CLIP's has)."""
    patch_dropout: Rate = 0.0
    """Share of patch tokens that each image leaves out in training, drawn anew each time, after positions were added (EVA-CLIP
    g+ and E: 0.5)."""
    text: TextSettings = TextSettings()
    init_logit_scale: Annotated[float, Field(ge=0.0, le=MAX_LOGIT_SCALE)] = math.log(1 / 0.07)
    """Logarithm of the first temperature (CLIP: ln(1 / 0.07); SigLIP: ln 10)."""
    init_logit_bias: float | None = None
    """A learned bias of the logits that starts here (SigLIP: -10); null for none."""
    init: Literal["trunk", "clip"] = "trunk"
    """What starts from `init_from`. "trunk": the image tower's trunk. "clip": all of a CLIP model (EVA-CLIP L/14 at 336 px starts
    from the one at 224), so its text tower, both projections, logit scale and bias as well; where the model does not describe its
    text tower, `text.init_from` names the architecture."""
    lock_image: bool = False
    """The trunk does not train (LiT); its projection does. Its batch norms keep their statistics."""
    image_unlocked_groups: int = Field(0, ge=0)
    """Of a locked trunk, the last layer groups (blocks or stages, by timm's count) train."""
    lock_text: bool = False
    """The text tower does not train, its projection included (as ViTamin's LTT)."""
    text_unlocked_groups: int = Field(0, ge=0)
    """Of a locked text tower, the last groups train: projection; last block with final norm; further blocks; embeddings."""

    @model_validator(mode="after")
    def _locks_lock_something(self) -> ClipSettings:
        for tower, locked, unlocked in (
            ("image", self.lock_image, self.image_unlocked_groups), ("text", self.lock_text, self.text_unlocked_groups)
        ):
            if unlocked and not locked:
                raise ValueError(f"student.{tower}_unlocked_groups={unlocked} needs student.lock_{tower}=true")
        if self.lock_text and not self.text_unlocked_groups and self.text.projection == "new":
            raise ValueError("student.text.projection=new would never train with student.lock_text=true; leave it out")
        return self

    @model_validator(mode="after")
    def _a_clip_model_has_its_text(self) -> ClipSettings:
        if self.init == "clip" and (self.text.weights is not None or self.text.projection == "new"):
            raise ValueError("student.init=clip takes the text tower and its projection from init_from; leave out "
                             "student.text.weights and student.text.projection")
        return self


def clip_file(path: str) -> Path:
    """The file of a CLIP model: in a clip stage's folder beside the trunk, else at `path` itself."""
    beside = Path(path) / CLIP_WEIGHTS
    return beside if beside.is_file() else Path(path)
