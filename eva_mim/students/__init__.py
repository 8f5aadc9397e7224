"""Settings of networks under training. A student's module is imported when it is used."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from eva_mim.core.run_folder import CLIP_WEIGHTS
from eva_mim.core.settings import For, Settings
from eva_mim.trunks import Rate, TrunkSettings

MAX_LOGIT_SCALE = math.log(100)
"""Largest logit scale, as a logarithm: CLIP (Radford et al. 2021, section 2.5) and EVA-CLIP clip the learned value here."""


class InitSettings(Settings):
    """Initialisation of a student without `init_from`."""

    law: Literal["timm", "eva01", "eva02", "mae"] = "timm"
    """"timm": the architecture's own initialisation. The others are described, with sources, in `students/initialise.py`."""
    std: Annotated[float, Field(gt=0.0), For("law", "eva01", "eva02")] = 0.02
    """Standard deviation of the normal distribution before its truncation at one standard deviation (EVA-01 g: 0.015)."""


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


class HeadSettings(Settings):
    """A head of a masked student. `head: mlp` is read as `head: {kind: mlp}`."""

    kind: str = "linear"
    """"linear"; "none": the student's own features, for an anchor; "mlp" (AM-RADIO); "mlp_v2" (RADIOv2.5: residual blocks);
    "attention" (C-RADIOv4: two transformer blocks before these, for patches); or another name in `HEADS` (`core/registry.py`)."""
    width: Annotated[int | None, Field(ge=1), For("kind", "mlp", "mlp_v2", "attention")] = None
    """Width of the hidden layers; default the largest width among the teachers' features."""
    blocks: Annotated[int, Field(ge=0), For("kind", "mlp_v2", "attention")] = 1
    """Number of residual blocks."""
    upsample: Annotated[int, Field(ge=1), For("kind", "linear", "mlp", "mlp_v2", "attention")] = 1
    """u: each patch predicts u x u cells of a teacher whose grid is u times as fine."""

    @model_validator(mode="before")
    @classmethod
    def _kind_alone(cls, tree: Any) -> Any:
        return {"kind": tree} if isinstance(tree, str) else tree


class WindowSettings(Settings):
    """Windowed attention as an augmentation of training (ViTDet; AM-RADIO): most blocks see windows of the patches."""

    sides: tuple[Annotated[int, Field(ge=2)], ...] = Field((6, 7, 8, 9, 12, 14, 16), min_length=1)
    """Sides of windows in patches; of those that divide the grid one is drawn for each step (C-RADIOv4: from 6 to 32)."""
    global_blocks: int = Field(4, ge=1)
    """Number of blocks that see all patches, evenly spread, the last block among them (RADIOv2.5: 4)."""


class MaskedSettings(TrunkSettings):
    """A trunk that predicts the features of masked patches."""

    form: Literal["mask_tokens", "visible", "pixel_fill", "masked_conv"] = "mask_tokens"
    """"mask_tokens": the trunk's input has mask tokens in place of masked patches (EVA). "visible": its input are the visible
    patches alone, and a small decoder predicts the masked ones (MAE, EVA-L). "pixel_fill": masked patches have the mean colour,
    and mask tokens where the trunk has patch tokens: for hybrids and all trunks with a last map. "masked_conv": the same, and the
    convolutional blocks of a hybrid are set to 0 in masked patches again (ConvMAE)."""
    position_grid: Annotated[int, Field(ge=2), For("positions", "cropped")] = 128
    """Places a side of the table of positions=cropped (RADIO: 128, of 2,048 px)."""
    windows: WindowSettings | None = None
    """Windowed attention in training; null for none. Held-out images are always seen whole."""
    init: InitSettings = InitSettings()
    head: HeadSettings = HeadSettings()
    """Head that predicts a target from a patch. `teachers.NAME.head` has precedence."""
    class_tokens: Literal["shared", "per_teacher", "none"] = "shared"
    """What teachers' summaries are predicted from. "shared": the class token; "per_teacher": a class token for each teacher with
    a summary, in their order: the class token and the first of the `registers`; "none": the mean of the patches."""
    decoder: Annotated[DecoderSettings, For("form", "visible")] = DecoderSettings()


class ClassifierSettings(TrunkSettings):
    """A trunk with a classification head."""

    global_pool: Literal["avg", "token"] = "avg"
    """Pooling of tokens to one vector: mean of the patches, or the class token."""
    head_scale: Annotated[float, Field(gt=0.0, le=1.0)] = 0.001
    """Factor on a new head's weights, so that training starts at nearly uniform probabilities (init_scale in
    EVA-01/eva/modeling_finetune.py)."""
    head_rows: Literal["new", "all", "shared"] = "new"
    """Initialisation of a head whose classes differ from those of `init_from`. "new": all rows are new. "all": every row is a
    copy of the row of the same class, which must exist. "shared": rows of common classes are copied, the others are new."""
    head_classes: str | None = None
    """Class list of the head of `init_from`, if the checkpoint has none: a layout, or another input of `eva-mim labels`."""

    @model_validator(mode="after")
    def _whole_table(self) -> ClassifierSettings:
        if self.positions == "cropped":
            raise ValueError("student.positions=cropped is for masked students (mim); set it to learned")
        return self

    @model_validator(mode="after")
    def _classes_are_for_rows(self) -> ClassifierSettings:
        if self.head_classes is not None and self.head_rows == "new":
            raise ValueError("student.head_classes is of use with student.head_rows=all or shared only")
        return self


class VideoClassifierSettings(ClassifierSettings):
    """A classifier of videos."""

    frames: int = Field(16, ge=1)
    """T, frames of a video that it sees."""
    time: Literal["joint", "mean"] = "joint"
    """"joint": attention over the patches of all frames (EVA-01), of plain transformers and hybrids. "mean": the mean of the
    answers to single frames, of any trunk."""


class SegmentationHeadSettings(Settings):
    """The head of a segmentation model."""

    kind: Literal["linear", "upernet"] = "linear"
    """"linear": batch norm and a 1 x 1 convolution on the grid of patches (the probe of DINOv2 and RADIO). "upernet": UperNet, of
    transformers (pip install 'eva-mim[dense]'), on maps of 4, 8, 16 and 32 pixels a cell, with an auxiliary FCN head in
    training."""
    blocks: tuple[int, ...] | None = Field(None, min_length=1)
    """Blocks or stages of the trunk, from 0 (-1 is the last), whose maps the head sees. linear: any, side by side; default the
    last. upernet: four; default four evenly spaced ones (EVA-02 B: 3, 5, 7, 11)."""
    normed: bool | None = None
    """True: the maps pass the trunk's last norm. Default true for linear (DINOv2), false for upernet (EVA-02)."""
    width: Annotated[int, For("kind", "upernet")] = Field(512, ge=1)
    """Channels of UperNet."""
    auxiliary: Annotated[float, Field(ge=0.0), For("kind", "upernet")] = 0.4
    """Factor on the loss of the auxiliary head, which sees the third map; 0: there is none."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Share of channels that are dropped before the last convolution (mmsegmentation)."""

    @model_validator(mode="after")
    def _four_maps(self) -> SegmentationHeadSettings:
        if self.kind == "upernet" and self.blocks is not None and len(self.blocks) != 4:
            raise ValueError(f"student.head.blocks={list(self.blocks)}: UperNet sees four")
        return self


class SegmenterSettings(TrunkSettings):
    """A trunk with a head that gives each pixel a class."""

    head: SegmentationHeadSettings = SegmentationHeadSettings()
    frozen: bool = False
    """True: the head alone is trained (a probe of the trunk)."""

    @model_validator(mode="after")
    def _whole_table(self) -> SegmenterSettings:
        if self.positions == "cropped":
            raise ValueError("student.positions=cropped is for masked students (mim); set it to learned")
        return self

    @model_validator(mode="after")
    def _frozen_trunks_are_still(self) -> SegmenterSettings:
        for name, still in (("drop_path", 0.0), ("grad_checkpointing", False), ("patch_grad_scale", 1.0)):
            if self.frozen and getattr(self, name) != still:
                raise ValueError(f"student.{name}={getattr(self, name)} has no effect with student.frozen=true; leave it out")
        return self


class ProbeSettings(Settings):
    """Training of a linear probe."""

    cached: bool = False
    """True: features of all images are computed once, with the held-out view, and stored below $EVA_MIM_CACHE (~/.cache/eva-mim):
    an epoch takes seconds, but without random crops and flips. False: every step runs the trunk on images (EVA's own probe)."""
    lrs: Annotated[tuple[Annotated[float, Field(gt=0.0)], ...], Field(min_length=1)] | None = None
    """Peak learning rates, in place of `optim.lr`: one layer for each is trained on the same features, and the best layer is the
    result. The schedule has the same form for all, and ends at the same share of the peak."""
    select: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of the training images on which the best of several `lrs` is chosen; no layer is trained on them."""

    @model_validator(mode="after")
    def _rates_have_names(self) -> ProbeSettings:
        names = [f"{lr:g}" for lr in self.lrs or ()]
        if len(set(names)) < len(names):
            raise ValueError(f"probe.lrs={list(self.lrs or ())}: two are the same to six digits")
        return self


class TextSettings(Settings):
    """The text tower of a CLIP student."""

    init_from: str | None = None
    """Source of the tower's size and weights: folder of an earlier clip stage, or an open_clip architecture name."""
    weights: str | None = None
    """For an open_clip architecture name: pretrained tag or local file. Null: only the architecture is taken."""
    width: int | None = Field(None, ge=1)
    """Default 128; with `init_from` it must be the source's width. The same holds for `layers` (2) and `heads` (4)."""
    layers: int | None = Field(None, ge=1)
    heads: int | None = Field(None, ge=1)
    context_length: int | None = Field(None, ge=3)
    """Longest caption in tokens, start and end included; longer captions are cut. Default 24, or the source's. For fewer tokens
    than the source's, its first positions are taken; for more, positions are interpolated as in open_clip."""
    projection: Literal["new", "reused"] | None = None
    """Projection into the shared space: new, or reused from the source; default reused if the text tower is locked, else new
    (EVA-CLIP)."""
    quick_gelu: bool | None = None
    """Use OpenAI's approximation of GELU; default as in the source. EVA-CLIP uses exact GELU with OpenAI's weights, too."""

    @model_validator(mode="after")
    def _weights_have_an_architecture(self) -> TextSettings:
        if self.weights is not None and self.init_from is None:
            raise ValueError(f"student.text.weights={self.weights} needs the architecture's name in student.text.init_from")
        return self


class ClipSettings(TrunkSettings):
    """A timm image tower and a text tower whose features are in one shared space."""

    embed_dim: int = Field(128, ge=1)
    """Width of the shared space."""
    pool: Literal["avg", "token", "map"] = "avg"
    """Pooling of the trunk's output to one vector (timm's `global_pool`)."""
    proj_bias: bool = False
    """Give the image tower's projection into the shared space a bias (as in EVA-CLIP)."""
    patch_dropout: Rate = 0.0
    """Share of patch tokens that are dropped from each image in training, drawn anew each time, after positions are added
    (EVA-CLIP g+ and E: 0.5)."""
    text: TextSettings = TextSettings()
    init_logit_scale: Annotated[float, Field(ge=0.0, le=MAX_LOGIT_SCALE)] = math.log(1 / 0.07)
    """Logarithm of the initial logit scale (CLIP: ln(1 / 0.07); SigLIP: ln 10)."""
    init_logit_bias: float | None = None
    """Initial value of a learned bias of the logits (SigLIP: -10); null for no bias."""
    init: Literal["trunk", "clip"] = "trunk"
    """Part of the student that starts from `init_from`. "trunk": the image tower's trunk. "clip": the full CLIP model (EVA-CLIP
    L/14 at 336 px starts from that at 224 px), with text tower, both projections, logit scale and bias; if the checkpoint has no
    configuration of its text tower, `text.init_from` is the name of the architecture."""
    lock_image: bool = False
    """Freeze the trunk (LiT), with the statistics of its batch norms; its projection is trained."""
    image_unlocked_groups: int = Field(0, ge=0)
    """Number of last layer groups (blocks or stages, by timm's count) of a locked trunk that are trained."""
    lock_text: bool = False
    """Freeze the text tower with its projection (as in ViTamin's LTT)."""
    text_unlocked_groups: int = Field(0, ge=0)
    """Number of last groups of a locked text tower that are trained. Groups from the last: projection; last block with final
    norm; further blocks; embeddings."""

    @model_validator(mode="after")
    def _positions_are_open_clips(self) -> ClipSettings:
        if self.positions != "learned":
            raise ValueError(f"student.positions={self.positions}: a clip stage's tower is open_clip's, with the positions of "
                             "its architecture or none; leave it out. It cannot start from a masked stage that gave positions to "
                             "a trunk without any")
        return self

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
    """Returns the path of a CLIP model's file: in a clip stage's folder the file beside the trunk's, else `path` itself."""
    beside = Path(path) / CLIP_WEIGHTS
    return beside if beside.is_file() else Path(path)
