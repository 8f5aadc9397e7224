"""Frozen networks that give targets. This file holds the settings; a teacher is imported when it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from eva_mim.config import Settings
from eva_mim.registry import TEACHERS, lookup

if TYPE_CHECKING:
    from eva_mim.contracts import Teacher


class TeacherSettings(Settings):
    """Which frozen network gives the targets."""

    kind: str = "open_clip"
    """"open_clip" (image tower of a CLIP model), "timm" (any timm trunk) or "stage" (folder of our own clip stage)."""
    name: str
    """Architecture name (open_clip, timm), or the stage's folder."""
    weights: str | None = None
    """open_clip: pretrained tag or local file; timm: "pretrained" or a local file. None: random (for tests only)."""
    image_size: int | None = Field(None, ge=1)
    """Input side in pixels; default the teacher's own."""


def build_teacher(settings: TeacherSettings) -> Teacher:
    """The teacher, frozen, on the CPU. Raises UserError for an unknown name, missing weights or an unusable trunk."""
    teacher: Teacher = lookup(TEACHERS, settings.kind, "teacher.kind")(settings)
    return teacher
