"""CLIP image towers as teachers: patch features after the final norm and CLIP's projection (EVA-01/eva/clip/model.py)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import open_clip
import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from safetensors import SafetensorError
from torch import Tensor, nn

import eva_mim.students.small  # noqa: F401  (makes our small architectures known to timm)
from eva_mim.config import UserError
from eva_mim.contracts import Features
from eva_mim.teachers.frozen import FrozenTeacher, per_patch, tokens_and_grid

if TYPE_CHECKING:
    from eva_mim.teachers import TeacherSettings

CONFIG = "open_clip_config.json"


def open_clip_teacher(settings: TeacherSettings) -> FrozenTeacher:
    """A tower by open_clip's architecture name, with a pretrained tag or a local weight file. Raises UserError."""
    known = open_clip.list_models()
    if settings.name not in known:
        raise UserError(f"teacher.name: {settings.name!r} is not among open_clip's {len(known)} architectures")
    return _teacher(settings, settings.name, settings.weights)


def stage_teacher(settings: TeacherSettings) -> FrozenTeacher:
    """The tower of a finished clip stage of ours. Raises UserError when the folder does not hold one."""
    if not (Path(settings.name) / CONFIG).is_file():
        raise UserError(f"teacher.name: {settings.name} has no {CONFIG}; it must be the folder of a finished clip stage")
    if not (Path(settings.name) / "open_clip_model.safetensors").is_file():
        raise UserError(f"teacher.name: {settings.name} has no open_clip_model.safetensors")
    return _teacher(settings, f"local-dir:{settings.name}", None)


def _teacher(settings: TeacherSettings, name: str, pretrained: str | None) -> FrozenTeacher:
    options: dict[str, Any] = {} if settings.image_size is None else {"force_image_size": settings.image_size}
    try:
        model = open_clip.create_model(name, pretrained=pretrained, weights_only=True, **options)
    except (RuntimeError, OSError, ValueError, SafetensorError) as error:
        raise UserError(f"teacher {settings.name} with weights {settings.weights}: {error}") from None
    visual = model.visual
    size = visual.image_size[0] if isinstance(visual.image_size, tuple) else visual.image_size
    preprocess = getattr(visual, "preprocess_cfg", {})
    return FrozenTeacher(
        visual,
        dense_features(visual),
        image_size=size,
        mean=tuple(preprocess.get("mean", open_clip.OPENAI_DATASET_MEAN)),
        std=tuple(preprocess.get("std", open_clip.OPENAI_DATASET_STD)),
    )


def dense_features(visual: nn.Module) -> Any:
    """Function pixels -> Features for open_clip's two kinds of tower. Raises UserError for towers without a dense map."""
    if isinstance(visual, VisionTransformer):
        if visual.attn_pool is not None or visual.final_ln_after_pool:
            raise UserError("teacher: an attention-pooled tower has no projected patch features")
        visual.output_tokens = True

        def transformer(images: Tensor) -> Features:
            summary, tokens = visual(images)
            spatial = tokens @ visual.proj if visual.proj is not None else tokens
            return Features(summary, spatial, (visual.grid_size[0], visual.grid_size[1]))

        return transformer
    if isinstance(visual, TimmModel):
        return _timm_tower(visual)
    raise UserError(f"teacher: open_clip towers of type {type(visual).__name__} are not supported")


def _timm_tower(visual: TimmModel) -> Any:
    trunk = visual.trunk
    if "pool" in dict(visual.head.named_children()) or getattr(trunk, "attn_pool", None) is not None:
        raise UserError("teacher: an attention-pooled tower has no projected patch features")

    def head(features: Tensor) -> Tensor:
        return torch.as_tensor(visual.head(trunk.forward_head(features)))

    def tower(images: Tensor) -> Features:
        features = trunk.forward_features(images)
        tokens, grid = tokens_and_grid(features, trunk)
        return Features(head(features), per_patch(features, tokens, trunk, head), grid)

    return tower
