"""Any timm trunk as a teacher: patch features after its final norm, without projection."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
from torch import Tensor

import eva_mim.students.small  # noqa: F401  (makes our small architectures known to timm)
from eva_mim.config import UserError
from eva_mim.contracts import Features
from eva_mim.teachers.frozen import FrozenTeacher, per_patch, tokens_and_grid

if TYPE_CHECKING:
    from eva_mim.teachers import TeacherSettings


def timm_teacher(settings: TeacherSettings) -> FrozenTeacher:
    """A trunk by timm's name; mean, std and size from its pretrained configuration. Raises UserError."""
    options: dict[str, Any] = {}
    if settings.weights == "pretrained":
        options["pretrained"] = True
    elif settings.weights is not None:
        if not Path(settings.weights).is_file():
            raise UserError(f"teacher.weights: {settings.weights} does not exist")
        options |= {"pretrained": True, "pretrained_cfg_overlay": {"file": settings.weights}}
    if settings.image_size is not None:
        options["img_size"] = settings.image_size
    try:
        trunk = timm.create_model(settings.name, num_classes=0, **options)
    except (RuntimeError, OSError, ValueError, TypeError) as error:
        raise UserError(f"teacher {settings.name} with weights {settings.weights}: {error}") from None
    config = trunk.pretrained_cfg

    def head(output: Tensor) -> Tensor:
        pooled: Tensor = trunk.forward_head(output, pre_logits=True)
        return pooled

    def features(images: Tensor) -> Features:
        output = trunk.forward_features(images)
        tokens, grid = tokens_and_grid(output, trunk)
        return Features(head(output), per_patch(output, tokens, trunk, head), grid)

    return FrozenTeacher(
        trunk,
        features,
        image_size=settings.image_size or config["input_size"][-1],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )
