"""Tables from names in settings to "module:attribute". A module is imported only when its name is used."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any, NamedTuple

from eva_mim.core.errors import UserError


class Command(NamedTuple):
    """A command or subcommand of `eva-mim`: its module, and its line in the help."""

    place: str
    """"module", or "module:attribute"."""
    help: str


SOURCES = {
    "scenes": "eva_mim.data.sources.scenes:open_scenes",
    "folder": "eva_mim.data.sources.folder:open_folder",
    "shards": "eva_mim.data.sources.shards:open_shards",
    "list": "eva_mim.data.sources.lists:open_list",
}
TEACHERS = {
    "open_clip": "eva_mim.teachers.open_clip:open_clip_teacher",
    "stage": "eva_mim.weights.adaptors:stage_teacher",
    "timm": "eva_mim.teachers.timm:timm_teacher",
    "pixels": "eva_mim.teachers.pixels:pixel_teacher",
}
HEADS = {
    "none": "eva_mim.students.heads:none",
    "linear": "eva_mim.students.heads:linear",
    "mlp": "eva_mim.students.heads:mlp",
    "mlp_v2": "eva_mim.students.heads:ResidualMlp",
    "attention": "eva_mim.students.heads:AttentionHead",
}
"""(D, C, HeadSettings) -> module from [M, D] patches to [M, C] predictions."""
OBJECTIVES = {
    "cosine": "eva_mim.tasks.objectives:masked_cosine",
    "mse": "eva_mim.tasks.objectives:masked_mse",
    "cosine_smooth_l1": "eva_mim.tasks.objectives:cosine_smooth_l1",
}
"""(prediction [M, C], target [M, C]) -> LossTerm."""
ENGINES = {
    "local": "eva_mim.engine.local:LocalEngine",
    "deepspeed": "eva_mim.engine.deepspeed:DeepSpeedEngine",
}
PROGRAMS = {
    "mim": Command("pretrain.mim:STAGE", "masked feature pretraining with frozen teachers"),
    "clip": Command("pretrain.clip:STAGE", "contrastive image-text training"),
    "classify": Command("finetune.classify:STAGE", "fine-tuning of a classifier (the broad and the target stage)"),
    "probe": Command("finetune.probe:STAGE", "linear probe on frozen features"),
    "segment": Command("finetune.segment:STAGE", "semantic segmentation"),
    "video": Command("finetune.video:STAGE", "classification of videos"),
}
"""Stages: each place is a `run.program.Stage`, whose module also runs as `python -m MODULE`."""


def sentence(summary: str) -> str:
    """Returns a line of a list of commands as a sentence, for the command's own help."""
    return f"{summary[0].upper()}{summary[1:]}."


def nearest(name: str, names: Iterable[str], *, count: int = 1, cutoff: float = 0.6) -> str:
    """Returns the end of a message, "; did you mean A, B or C?", with up to `count` of `names` that are most similar to `name`
    (similarity at least `cutoff`, 0 to 1); "" if there is none."""
    *others, last = difflib.get_close_matches(name, list(names), n=count, cutoff=cutoff) or [""]
    return f"; did you mean {', '.join(others) + ' or ' if others else ''}{last}?" if last else ""


def lookup(table: Mapping[str, str | Command], name: str, setting: str) -> Any:
    """Returns the object that `table` has under `name`. Raises UserError, which names `setting` and the known names."""
    if name not in table:
        raise UserError(f"{setting}: {name!r} is not known{nearest(name, table) or ';'} known: {', '.join(table)}")
    entry = table[name]
    return load(entry.place if isinstance(entry, Command) else entry)


def load(place: str) -> Any:
    """Imports and returns the object at "module:attribute", or the module at "module"."""
    module, _, attribute = place.partition(":")
    return getattr(import_module(module), attribute) if attribute else import_module(module)
