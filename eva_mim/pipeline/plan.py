"""Plan of a pipeline: its stages with their final settings, checked before anything runs. Light to import.

A pipeline file lists stages; each has its recipe and the names of the earlier stages that it builds on:

    settings: {data.root: ../images}          # for every stage
    stages:
      - {name: teacher, program: clip, recipe: configs/clip/x.yaml}
      - {name: mim, program: mim, recipe: configs/mim/x.yaml, teacher: teacher}
      - {name: target, program: classify, recipe: configs/classify/x.yaml, init_from: mim, settings: {optim.lr: 1e-3}}
    compare: [[target, target_scratch]]       # figures side by side in the summary
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, field_validator, model_validator

from eva_mim.core.errors import UserError
from eva_mim.core.recipe_files import read_yaml
from eva_mim.core.registry import PROGRAMS, lookup
from eva_mim.core.resolve import Change, apply, say_changes, touched
from eva_mim.core.settings import Settings, parse
from eva_mim.run.recipe import Recipe


@cache
def sections() -> frozenset[str]:
    """Returns the names of all sections of the stages' recipes. A stage may not have such a name, since an override for the stage
    would look like a setting. The exception is "probe", which is a program's name as well: `probe.a.b=c` is then for the stage,
    `probe.probe.b=c` for its section."""
    return frozenset(name for program in PROGRAMS for name in lookup(PROGRAMS, program, "program").recipe.model_fields)


class StageEntry(Settings):
    """One stage of a pipeline."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    program: str
    """Name of the stage's program in `registry.PROGRAMS`."""
    recipe: str
    settings: dict[str, Any] = {}
    """Dotted setting -> value, which overrides the recipe's own."""
    init_from: str | None = None
    """Earlier stage whose trunk this one starts from."""
    init_heads: str | None = None
    """Earlier masked stage whose heads those of this one start from."""
    teacher: str | None = None
    """Earlier clip or masked stage that is the teacher."""
    teachers: dict[str, str] = {}
    """Earlier clip or masked stages that are teachers, by the name of the teacher."""
    text_from: str | None = None
    """Earlier clip stage whose text tower this one starts from."""

    @property
    def parents(self) -> dict[str, str]:
        """Earlier stages that this one builds on, by the setting that names them."""
        named = {"init_from": self.init_from, "init_heads": self.init_heads, "teacher": self.teacher, "text_from": self.text_from}
        return {setting: stage for setting, stage in named.items() if stage is not None} | {
            f"teachers.{name}": stage for name, stage in self.teachers.items()
        }


class PipelineFile(Settings):
    """Content of a pipeline's YAML file."""

    settings: dict[str, Any] = {}
    """Dotted setting -> value, for every stage whose recipe has that section."""
    stages: list[StageEntry] = Field(min_length=1)
    compare: list[list[str]] = []
    """Groups of stages whose headline figures the summary compares, the first stage of a group with each other one."""

    @field_validator("stages")
    @classmethod
    def _in_order(cls, stages: list[StageEntry]) -> list[StageEntry]:
        seen: dict[str, str] = {}
        for stage in stages:
            if stage.name in seen or stage.name in sections() - PROGRAMS.keys():
                raise ValueError(f"stage name {stage.name!r} is used twice or is a recipe's section")
            lookup(PROGRAMS, stage.program, f"stages.{stage.name}.program")
            for setting, parent in stage.parents.items():
                if parent not in seen:
                    known = ", ".join(seen) or "none"
                    raise ValueError(f"{stage.name}.{setting}: {parent!r} is not an earlier stage (earlier: {known})")
            seen[stage.name] = stage.program
        return stages

    @model_validator(mode="after")
    def _compares_stages(self) -> PipelineFile:
        names = {stage.name for stage in self.stages}
        unknown = sorted({name for group in self.compare for name in group} - names)
        if unknown:
            raise ValueError(f"compare: {', '.join(unknown)}: no such stage")
        return self


@dataclass(frozen=True)
class PlannedStage:
    """A stage with its final settings."""

    entry: StageEntry
    recipe: Recipe
    assignments: list[str]
    """Overrides that distinguish its settings from the recipe file."""
    out: Path

    def shell(self, start: str = "eva-mim") -> str:
        """Returns the plain command that runs this stage alone; `start` stands in place of "eva-mim"."""
        return shlex.join([start, self.entry.program, self.entry.recipe, *self.assignments, "--out", str(self.out)])


def plan(path: str, overrides: list[str], out: Path) -> tuple[PipelineFile, list[PlannedStage]]:
    """Returns the pipeline file and its stages with their final settings, checked before anything runs. Raises one UserError with
    the mistakes of all stages."""
    file = parse(PipelineFile, read_yaml(path), path)
    return file, planned_stages(file, overrides, out)


def planned_stages(file: PipelineFile, overrides: list[str], out: Path) -> list[PlannedStage]:
    """Returns the stages of a pipeline with their final settings. Raises one UserError with the mistakes of all stages."""
    names = {stage.name for stage in file.stages}
    planned, mistakes = [], []
    for stage in file.stages:
        chosen = [rest if head == stage.name else text for text in overrides for head, _, rest in [text.partition(".")]
                  if head == stage.name or head not in names]
        common = {name: value for name, value in file.settings.items() if name not in stage.settings}
        layers = [_assigned(common), _assigned(stage.settings), chosen + _assigned(_parents(stage, out))]
        try:
            planned.append(_planned(stage, layers, out))
        except UserError as error:
            mistakes.append(str(error))
    if mistakes:
        raise UserError("\n".join(dict.fromkeys(mistakes)))
    return planned


def _planned(stage: StageEntry, layers: list[list[str]], out: Path) -> PlannedStage:
    """Returns a stage with its final settings. Each layer of overrides takes precedence over the earlier layers and the recipe;
    if it changes a kind, their settings for the old kind are dropped. Raises UserError."""
    model = lookup(PROGRAMS, stage.program, "program").recipe
    tree, source = read_yaml(stage.recipe), f"stage {stage.name} ({stage.recipe})"
    kept: list[str] = []
    changes: list[Change] = []
    for layer in layers:
        layer = [text for text in layer if _applies(model, text)]
        tree, removed = apply(model, tree, layer)
        paths = [change.setting.path for change in removed]
        kept = [text for text in kept if not any(touched(path, [text]) for path in paths)] + layer
        changes += removed
    say_changes(source, changes)
    return PlannedStage(stage, parse(model, tree, source), kept, out / stage.name)


def _assigned(values: dict[str, Any]) -> list[str]:
    return [f"{name}={_plain(value)}" for name, value in values.items()]


def _applies(model: type[Recipe], assignment: str) -> bool:
    """Returns whether the recipe has the section of an override. A setting for all stages is left out of recipes without its
    section (a teacher in a classifier). Raises UserError for a section that no recipe has."""
    section = assignment.partition("=")[0].partition(".")[0]
    if section in model.model_fields:
        return True
    if section in sections():
        return False
    raise UserError(f"{assignment}: neither a stage of this pipeline nor a section of its recipes")


def _parents(stage: StageEntry, out: Path) -> dict[str, str]:
    values = {}
    for setting in ("init_from", "init_heads"):
        if (parent := getattr(stage, setting)) is not None:
            values[setting] = str(out / parent)
    for setting, parent in stage.parents.items():
        if setting.startswith("teacher"):
            values |= {f"{setting}.kind": "stage", f"{setting}.name": str(out / parent)}
    if stage.text_from is not None:
        values["student.text.init_from"] = str(out / stage.text_from)
    return values


def _plain(value: Any) -> str:
    """Returns text that YAML reads as `value`, quoted only if necessary."""
    return value if isinstance(value, str) and _reads_back(value) else json.dumps(value)


def _reads_back(text: str) -> bool:
    try:
        return bool(yaml.safe_load(text) == text)
    except (yaml.YAMLError, ValueError):
        return False


