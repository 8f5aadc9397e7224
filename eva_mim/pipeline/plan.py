"""Stages in a row: what is done is skipped, what changed is run again, what was killed goes on. Light to import.

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
from eva_mim.core.registry import PROGRAMS, lookup
from eva_mim.core.settings import Settings, override, parse, read_yaml
from eva_mim.run.recipe import Recipe


@cache
def sections() -> frozenset[str]:
    """Sections of all stages' recipes: a stage of such a name could not be told from a setting in an override."""
    return frozenset(name for program in PROGRAMS for name in lookup(PROGRAMS, program, "program").recipe.model_fields)


class StageEntry(Settings):
    """One stage of a pipeline."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    program: str
    """A name in `registry.PROGRAMS`."""
    recipe: str
    settings: dict[str, Any] = {}
    """Dotted setting -> value, over the recipe's own."""
    init_from: str | None = None
    """Earlier stage whose trunk this one starts from."""
    teacher: str | None = None
    """Earlier clip stage that is the teacher."""
    text_from: str | None = None
    """Earlier clip stage that gives the text tower."""


class PipelineFile(Settings):
    """A pipeline YAML."""

    settings: dict[str, Any] = {}
    """Dotted setting -> value, for every stage whose recipe has that section."""
    stages: list[StageEntry] = Field(min_length=1)
    compare: list[list[str]] = []
    """Groups of stages whose headline figures the summary sets side by side, the first against each other one."""

    @field_validator("stages")
    @classmethod
    def _in_order(cls, stages: list[StageEntry]) -> list[StageEntry]:
        seen: dict[str, str] = {}
        for stage in stages:
            if stage.name in seen or stage.name in sections():
                raise ValueError(f"stage name {stage.name!r} is used twice or is a recipe's section")
            lookup(PROGRAMS, stage.program, f"stages.{stage.name}.program")
            for setting in ("init_from", "teacher", "text_from"):
                parent = getattr(stage, setting)
                if parent is not None and parent not in seen:
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
    """What distinguishes it from the recipe file, as overrides."""
    out: Path

    def shell(self) -> str:
        """The plain command that runs this stage alone."""
        return shlex.join(["eva-mim", self.entry.program, self.entry.recipe, *self.assignments, "--out", str(self.out)])


def plan(path: str, overrides: list[str], out: Path) -> tuple[PipelineFile, list[PlannedStage]]:
    """Every stage's settings, checked before anything runs. Raises one UserError with the mistakes of all stages."""
    file = parse(PipelineFile, read_yaml(path), path)
    names = {stage.name for stage in file.stages}
    planned, mistakes = [], []
    for stage in file.stages:
        assignments = [f"{name}={_plain(value)}" for name, value in {**file.settings, **stage.settings}.items()]
        for text in overrides:
            head, _, rest = text.partition(".")
            if head in names and head == stage.name:
                assignments.append(rest)
            elif head not in names:
                assignments.append(text)
        assignments += [f"{setting}={_plain(value)}" for setting, value in _parents(stage, out).items()]
        model = lookup(PROGRAMS, stage.program, "program").recipe
        try:
            tree = read_yaml(stage.recipe)
            kept = [text for text in assignments if _applies(model, text)]
            recipe = parse(model, override(tree, kept), f"stage {stage.name} ({stage.recipe})")
            planned.append(PlannedStage(stage, recipe, kept, out / stage.name))
        except UserError as error:
            mistakes.append(str(error))
    if mistakes:
        raise UserError("\n".join(dict.fromkeys(mistakes)))
    return file, planned


def _applies(model: type[Recipe], assignment: str) -> bool:
    """A setting for all stages is left out where the recipe has no such section (a teacher in a classifier)."""
    section = assignment.partition("=")[0].partition(".")[0]
    if section in model.model_fields:
        return True
    if section in sections():
        return False
    raise UserError(f"{assignment}: neither a stage of this pipeline nor a section of its recipes")


def _parents(stage: StageEntry, out: Path) -> dict[str, str]:
    values = {}
    if stage.init_from is not None:
        values["init_from"] = str(out / stage.init_from)
    if stage.teacher is not None:
        values |= {"teacher.kind": "stage", "teacher.name": str(out / stage.teacher)}
    if stage.text_from is not None:
        values["student.text.init_from"] = str(out / stage.text_from)
    return values


def _plain(value: Any) -> str:
    """Text that YAML reads back as `value`; quoted only where it must be."""
    return value if isinstance(value, str) and _reads_back(value) else json.dumps(value)


def _reads_back(text: str) -> bool:
    try:
        return bool(yaml.safe_load(text) == text)
    except (yaml.YAMLError, ValueError):
        return False


