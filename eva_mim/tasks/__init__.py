"""Tasks: one file for each kind of training step, with its losses. This file has their settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from eva_mim.core.settings import RUNTIME, For, Settings
from eva_mim.students import HeadSettings
from eva_mim.targets import NormaliserSettings
from eva_mim.teachers import TeacherSettings


class ObjectiveSettings(Settings):
    """Losses between predictions and a teacher's features."""

    kind: str | None = "cosine"
    """Loss of patches. "cosine": minus the mean cosine (EVA); "mse": mean squared error (MAE; RADIOv2.5, of normalised features);
    "cosine_smooth_l1": 0.9 (1 - cosine) + 0.1 smooth L1 (AM-RADIO); null: patches are not predicted."""
    summary: Literal["cosine", "angle"] | None = None
    """Loss of the summary. "cosine": 1 - cosine (AM-RADIO); "angle": the squared angle over the dispersion of the teacher's
    summaries (C-RADIOv4); null: the summary is not predicted."""
    summary_weight: Annotated[float, Field(gt=0.0), For("summary")] = 1.0
    """Factor on the loss of the summary."""
    masked: Annotated[float, Field(ge=0.0), For("kind")] = 1.0
    """Factor on the loss of masked patches; with mask.ratio=0 of all patches."""
    visible: Annotated[float, Field(ge=0.0), For("kind")] = 0.0
    """Factor on the loss of the patches that the student sees, beside masked ones."""

    @model_validator(mode="after")
    def _something_is_learned(self) -> ObjectiveSettings:
        if (self.kind is None or not self.masked + self.visible) and self.summary is None:
            raise ValueError("neither patches nor the summary would be predicted; set kind (with masked or visible above 0) or "
                             "summary")
        return self


class TargetTeacherSettings(TeacherSettings):
    """A teacher of a masked stage, with what the student learns from it."""

    objective: ObjectiveSettings | None = None
    """Losses against this teacher; default the recipe's `objective`."""
    head: HeadSettings | None = None
    """Heads for this teacher; default `student.head`."""
    normaliser: NormaliserSettings | None = None
    """Normalisation of its spatial features; default the recipe's `normaliser`."""
    interpolate: Literal["student", "larger"] | None = None
    """Bilinear interpolation where its grid of patches is not the student's. "student": of its features to the student's grid;
    "larger": of the features of the coarser grid to the finer one (AM-RADIO). null: such sizes are refused."""


class GroupSettings(Settings):
    """A part of each step: some teachers, the images that they teach, and the student's size for these."""

    teachers: tuple[str, ...] | None = Field(None, min_length=1)
    """Names of teachers; default all."""
    batch: int = Field(ge=1)
    """Images of each step; the groups' batches add up to run.global_batch, and follow one another in the order of samples."""
    image_size: int | Annotated[tuple[int, ...], Field(min_length=1)] | None = None
    """Side of the student's input in pixels; of several one is drawn for each step. Default student.image_size."""
    micro_batch: Annotated[int | None, RUNTIME] = Field(None, ge=1)
    """Images in one forward pass of one process; default run.micro_batch, or all of a process."""
    ranks: Annotated[int | None, RUNTIME] = Field(None, ge=1)
    """Number of processes that run this group alone; null: every process runs all groups in turn."""

    @property
    def sizes(self) -> tuple[int, ...] | None:
        """The student's sizes; None for its own."""
        return (self.image_size,) if isinstance(self.image_size, int) else self.image_size


class DistillSettings(Settings):
    """Distillation of a CLIP model's embeddings from a cache, beside the contrastive loss: its weight is `teacher.weight`."""

    teacher: TeacherSettings
    """The network whose summary of an image is the target."""
    captions: bool = False
    """True: the student's embedding of a caption learns the teacher's too. A caption then belongs to its view, with the view's
    number and seed, and comes again with it."""
    cached: Path | None = None
    """Folder that `eva-mim cache` made of this recipe; it must be given for training."""

    @model_validator(mode="after")
    def _teacher_has_a_path(self) -> DistillSettings:
        self.teacher.stand_at("contrastive.distill.teacher")
        return self


class ContrastiveSettings(Settings):
    """Contrastive loss between images and texts."""

    kind: Literal["clip", "siglip"] = "clip"
    """"clip": cross entropy over the batch, in both directions; "siglip": one sigmoid for each pair, with a learned bias."""
    chunk: Annotated[int | None, RUNTIME] = Field(None, ge=1)
    """Rows of logits computed at once, and recomputed in the backward pass: chunk x global_batch logits are in memory at a time,
    not micro_batch x global_batch (with accumulation: all rows of the process). Results are the same. Default all rows."""
    distill: DistillSettings | None = None
    """Further losses: 1 - cosine of the student's embedding, through a linear layer where the widths differ, and a teacher's
    (CLIP-KD, Yang et al. 2024, has the mean squared error)."""


class MixSettings(Settings):
    """Mixing of images and labels (timm's Mixup)."""

    mixup: Annotated[float, Field(ge=0.0)] = 0.0
    """Alpha of mixup; 0 is off."""
    cutmix: Annotated[float, Field(ge=0.0)] = 0.0
    """Alpha of cutmix; 0 is off."""
    smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Label smoothing."""
