"""timm trunks as teachers: patch features without projection."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from eva_mim.core.errors import UserError
from eva_mim.teachers.frozen import FrozenTeacher
from eva_mim.teachers.trunk import read_trunk
from eva_mim.trunks import facts
from eva_mim.trunks.create import check_name, create

if TYPE_CHECKING:
    from eva_mim.teachers import TeacherSettings


def timm_teacher(settings: TeacherSettings) -> FrozenTeacher:
    """Returns a trunk by timm's name, with mean, std and (by default) size of its pretrained configuration. Raises UserError."""
    if ":" not in settings.name:  # local-dir:FOLDER and hf-hub:NAME are timm's to read
        check_name(settings.name, settings.path)
    options: dict[str, Any] = {}
    if settings.weights == "pretrained":
        options["pretrained"] = True
    elif settings.weights is not None:
        if not Path(settings.weights).is_file():
            raise UserError(f"{settings.path}.weights: {settings.weights} does not exist")
        options |= {"pretrained": True, "pretrained_cfg_overlay": {"file": settings.weights}}
    try:
        trunk = _create(settings, num_classes=0, **options)
    except (RuntimeError, OSError, ValueError, TypeError) as error:
        raise UserError(f"{settings.path}: {settings.name} with weights {settings.weights}: {error}") from None
    mean, std = facts.mean_std(trunk)
    return FrozenTeacher(trunk, read_trunk(trunk, settings), settings, mean=mean, std=std,
                         image_size=settings.side or facts.configuration(trunk)["input_size"][-1])


def _create(settings: TeacherSettings, **options: Any) -> Any:
    sizes: dict[str, Any] = {} if settings.side is None else {"img_size": settings.side}
    if settings.follows:
        sizes["dynamic_img_size"] = True
    try:
        return create(settings.name, **sizes, **options)
    except TypeError as error:  # convolutional networks take any size, and many have no argument for it
        if "img_size" not in str(error):
            raise
    return create(settings.name, **options)
