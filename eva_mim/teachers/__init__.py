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
    """"open_clip" (image tower of a CLIP model), "timm" (any timm trunk), "stage" (folder of our own clip stage) or "pixels"
    (each patch's own pixels, as MAE predicts them)."""
    name: str
    """Architecture name (open_clip, timm), the stage's folder, or the patch side (pixels: "patch16")."""
    weights: str | None = None
    """open_clip: pretrained tag or local file; timm: "pretrained" or a local file. None: random (for tests only)."""
    image_size: int | None = Field(None, ge=1)
    """Input side in pixels; default the teacher's own (pixels: must be given)."""
    layer: int = -1
    """Block whose patches are the target, as a Python index; -1 is the last. The summary stays the network's own."""
    final_norm: bool = True
    """Put the output through the network's last norm (pixels: normalise each patch)."""
    project: bool | None = None
    """Put each patch through CLIP's projection into the shared space; default where the network has one."""


def build_teacher(settings: TeacherSettings) -> Teacher:
    """The teacher, frozen, on the CPU. Raises UserError for an unknown name, missing weights or an unusable trunk."""
    teacher: Teacher = lookup(TEACHERS, settings.kind, "teacher.kind")(settings)
    return teacher
