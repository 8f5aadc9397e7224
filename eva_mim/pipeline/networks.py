"""Check of a pipeline's networks before its first stage trains: each stage is built without values and started from its parents
as they will be."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from eva_mim.core.errors import UserError
from eva_mim.core.files import write_json
from eva_mim.core.registry import PROGRAMS, lookup
from eva_mim.core.resolve import resolve
from eva_mim.core.run_folder import CLIP_CONFIG, HEADS_CONFIG, TIMM_CONFIG
from eva_mim.core.settings import as_tree
from eva_mim.pipeline.plan import PlannedStage
from eva_mim.run.program import Stage
from eva_mim.run.recipe import Recipe
from eva_mim.weights.adaptors import heads_facts
from eva_mim.weights.export import timm_description
from eva_mim.weights.handover import Parent, match, planned_parent, read_parent


def check_networks(planned: list[PlannedStage], finished: set[str]) -> None:
    """Builds each stage that is not `finished` on the meta device, and matches it with the trunk that it starts from: one that
    is there, or the one that an earlier stage will leave. Raises one UserError with the mistakes of all stages; a stage whose
    parent cannot be built is not looked at."""
    mistakes, trunks = list[str](), dict[str, Parent]()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        for stage in planned:
            entry = stage.entry
            unknown = [parent for parent in entry.parents.values() if parent not in trunks and parent not in finished]
            if entry.name in finished or unknown:
                continue
            try:
                trunks[entry.name] = _check(stage, trunks, place)
            except UserError as error:
                mistakes.append(f"stage {entry.name}: {str(error).replace(f'{place}/', '')}")
    if mistakes:
        raise UserError("\n".join(mistakes))


def _check(stage: PlannedStage, trunks: dict[str, Parent], place: Path) -> Parent:
    """Returns the trunk that a stage will leave, and leaves the configuration of a CLIP model or a masked student in the folder
    `place`. Raises UserError."""
    entry, program = stage.entry, lookup(PROGRAMS, stage.entry.program, "program")
    recipe = _at(program, stage, trunks, place)
    student: Any = program.on_meta(recipe).student
    if recipe.init_from is not None:
        parent = trunks.get(entry.init_from or "") or read_parent(recipe.init_from, recipe.hand_over)
        match(student.trunk, parent, recipe.hand_over)
    if entry.program == "clip":
        (place / entry.name).mkdir()
        write_json(place / entry.name / CLIP_CONFIG, student.open_clip_config())
    if entry.program == "mim":  # it may be the teacher of a later one
        (place / entry.name).mkdir()
        write_json(place / entry.name / TIMM_CONFIG, timm_description(student.trunk, recipe.student))
        write_json(place / entry.name / HEADS_CONFIG, heads_facts(student).model_dump(mode="json"))
    return planned_parent(stage.out, student.trunk)


def _at(program: Stage, stage: PlannedStage, trunks: dict[str, Parent], place: Path) -> Recipe:
    """Returns the recipe of a stage whose teachers and text towers that are not there yet are read in `place`."""
    moved = []
    for setting, parent in stage.entry.parents.items():
        if parent in trunks and setting not in ("init_from", "init_heads"):
            where = "student.text.init_from" if setting == "text_from" else f"{setting}.name"
            moved.append(f"{where}={place / parent}")
    return resolve(program.recipe, as_tree(stage.recipe), moved, stage.entry.name) if moved else stage.recipe
