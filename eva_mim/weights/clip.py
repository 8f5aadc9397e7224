"""Start of a CLIP student from a whole CLIP model: both towers, their projections, the logit scale and bias."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from eva_mim.core.errors import UserError
from eva_mim.core.report import KeyReport
from eva_mim.core.run_folder import CLIP_CONFIG
from eva_mim.students import ClipSettings, clip_file
from eva_mim.students.clip import ClipStudent, TextSource, seed_text
from eva_mim.weights import HandOverSettings
from eva_mim.weights.files.lazy import finite, materialise
from eva_mim.weights.handover import parent_of, seed_trunk
from eva_mim.weights.names.eva import TRUNK
from eva_mim.weights.names.translate import read_source

OWN = ("visual.head.", "logit_scale", "logit_bias")
"""Prefixes of the tensors outside both trunk and text tower."""


TRUNK_HEAD = f"{TRUNK}head."


def with_text_of(settings: ClipSettings, path: str) -> ClipSettings:
    """Returns the settings; if they name no text tower, its architecture is read from the folder `path`. Raises UserError if
    that folder has no open_clip_config.json."""
    if settings.text.init_from is not None:
        return settings
    if not (Path(path) / CLIP_CONFIG).is_file():
        raise UserError(f"student.init=clip: {path} does not describe its text tower; name its architecture in "
                        "student.text.init_from (one of open_clip's, without student.text.weights)")
    return settings.model_copy(update={"text": settings.text.model_copy(update={"init_from": path})})


@torch.no_grad()
def init_clip_from_clip(student: ClipStudent, path: str, settings: ClipSettings, hand_over: HandOverSettings) -> KeyReport:
    """Copies a CLIP model into a student, in place; positions and the patch kernel are resized by the rules of `hand_over`.
    Returns the report of every tensor.

    Raises UserError for a checkpoint that is no CLIP model with a timm trunk, and for towers or a shared space of other sizes.
    """
    try:
        source = read_source(clip_file(path), hand_over.container)
    except UserError as error:
        raise UserError(f"init_from: {error}") from None
    given = dict(source.weights)
    for name in [name for name in given if name.startswith(TRUNK_HEAD)]:  # open_clip's EVA: head is projection
        given.setdefault(f"{OWN[0]}proj.{name.removeprefix(TRUNK_HEAD)}", given[name])
    if not any(name.startswith(TRUNK) for name in given) or not any(name.startswith("text.") for name in given):
        raise UserError(f"student.init=clip: {path} is no CLIP model with a timm image tower and a text tower; leave it out to "
                        "start the image tower alone")
    report = seed_trunk(student.trunk, parent_of(path, source, hand_over), hand_over)
    for name in [name for name in report.ignored if name.startswith((*OWN, "text.", "head.", TRUNK_HEAD))]:  # loaded below
        report.ignored.remove(name)
        report.reasons.pop(name, None)
    state: dict[str, Any] = student.model.state_dict()
    for name, value in state.items():
        if not name.startswith(OWN):
            continue
        if name not in given:
            report.note(report.new, name, "the whole model has none")
            continue
        if value.numel() != given[name].numel():
            raise UserError(f"student.embed_dim={settings.embed_dim}: {name} is {list(given[name].shape)} in {path} and "
                            f"{list(value.shape)} here; set student.embed_dim and student.proj_bias as they are there")
        value.copy_(finite(given[name], name, f"init_from: {path}").reshape(value.shape))
        report.loaded.append(name)
    for name in given:
        if name.startswith(OWN) and name not in state:
            report.note(report.ignored, name, "no part of the new model")
    weights = {name.removeprefix("text."): materialise(value) for name, value in given.items() if name.startswith("text.")}
    reused = settings.model_copy(update={"text": settings.text.model_copy(update={"projection": "reused"})})
    text = seed_text(student.model.text, TextSource(path, student.config["text_cfg"], False, weights), reused)
    return report.beside(text)
