"""Names -> "module:attribute", in one place. A part is imported only when it is used."""

from __future__ import annotations

import difflib
from importlib import import_module
from typing import Any

from eva_mim.core.errors import UserError

SOURCES = {
    "scenes": "eva_mim.data.sources.scenes:open_scenes",
    "folder": "eva_mim.data.sources.folder:open_folder",
    "shards": "eva_mim.data.sources.shards:open_shards",
    "list": "eva_mim.data.sources.lists:open_list",
}
TEACHERS = {
    "open_clip": "eva_mim.teachers.open_clip:open_clip_teacher",
    "stage": "eva_mim.teachers.open_clip:stage_teacher",
    "timm": "eva_mim.teachers.timm:timm_teacher",
    "pixels": "eva_mim.teachers.pixels:pixel_teacher",
}
OBJECTIVES = {
    "cosine": "eva_mim.tasks.masked:masked_cosine",
    "mse": "eva_mim.tasks.masked:masked_mse",
}
"""(prediction [M, C], target [M, C]) -> StepOutput."""
ENGINES = {
    "local": "eva_mim.engine.local:LocalEngine",
    "deepspeed": "eva_mim.engine.deepspeed:DeepSpeedEngine",
}
PROGRAMS = {
    "mim": "pretrain.mim",
    "clip": "pretrain.clip",
    "classify": "finetune.classify",
    "probe": "finetune.probe",
}
"""Stage programs: modules with `StageRecipe`, `build` and `main(argv)`; each is also `python -m MODULE`."""


def lookup(table: dict[str, str], name: str, setting: str) -> Any:
    """The object that `name` stands for in `table`. Raises UserError that lists the known names."""
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"{setting}: {name!r} is not known; {hint}known: {', '.join(table)}")
    module, _, attribute = table[name].partition(":")
    return getattr(import_module(module), attribute) if attribute else import_module(module)
