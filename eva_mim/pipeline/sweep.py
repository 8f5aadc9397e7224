"""A sweep: the same chain of stages for several towers, numbers of samples, seeds and data. Its cells, each a pipeline of its
own, and their check. Light to import.

    pipeline: configs/pipelines/x.yaml      # or the content of one
    stage: clip                             # whose number of samples varies, and whose trunk is counted
    figures: [clip.zeroshot_top1]
    towers: {vit: {student.name: vit_small_patch16_224}, hybrid: {student.name: vitamin_small_224}}
    samples: [128_000_000, 512_000_000]
    seeds: [0, 1, 2]
    sources: {datacomp: {data.root: /data/datacomp}, laion: {data.root: /data/laion}}
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import yaml
from pydantic import Field, model_validator

from eva_mim.core.errors import UserError
from eva_mim.core.files import write_text
from eva_mim.core.recipe_files import read_yaml
from eva_mim.core.settings import Settings, differences, few, parse
from eva_mim.pipeline.plan import PipelineFile, PlannedStage, planned_stages

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Values = dict[str, Any]
"""Settings by dotted name: for all stages with such a section, or STAGE.a.b for one."""
ONE = "data"
"""Name of the only source of a sweep without `sources`."""


class Published(Settings):
    """A point of somebody else's, drawn beside the cells."""

    tower: str
    samples: int = Field(ge=1)
    parameters: float = Field(gt=0)
    """Of the image tower."""
    macs: float = Field(gt=0)
    """Multiply-adds of the image tower for an image."""
    figures: dict[str, float]


class Sweep(Settings):
    """A sweep's file."""

    pipeline: str | PipelineFile
    stage: str
    figures: tuple[str, ...] = Field(min_length=1)
    """STAGE.FIGURE, or STAGE.SUITE/MEAN of what `eva-mim evaluate CELL/STAGE --suite SUITE` wrote; the first one is drawn."""
    towers: dict[Name, Values] = Field(min_length=1)
    samples: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    sources: dict[Name, Values] = {}
    published: tuple[Published, ...] = ()

    @model_validator(mode="after")
    def _nothing_twice(self) -> Sweep:
        for axis in ("samples", "seeds", "figures"):
            values = getattr(self, axis)
            if len(set(values)) < len(values):
                raise ValueError(f"{axis}={list(values)}: a value stands there twice")
        return self


class Cell(NamedTuple):
    """One combination."""

    tower: str
    source: str
    samples: int
    seed: int
    file: PipelineFile
    planned: list[PlannedStage]
    out: Path

    @property
    def name(self) -> str:
        """Name of its folder."""
        return self.out.name

    def write(self) -> Path:
        """Writes its pipeline into its folder, for `eva-mim pipeline`; returns the path. Raises UserError."""
        path = self.out / "pipeline.yaml"
        text = yaml.safe_dump(self.file.model_dump(mode="json", exclude_defaults=True), sort_keys=False)
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            write_text(path, f"# A cell of a sweep; eva-mim pipeline {path} --out {self.out}\n{text}")
        except OSError as error:
            raise UserError(f"--out {path}: {error.strerror or error}") from None
        return path


def read_sweep(path: str) -> Sweep:
    """Returns the settings of a sweep's file. Raises UserError."""
    return parse(Sweep, read_yaml(path), path)


def cells_of(sweep: Sweep, out: Path, settings: Values) -> list[Cell]:
    """Returns all cells, checked: those of the first seed come first, so that a sweep that is cut short has whole curves.
    `settings`: further settings of all cells. Raises one UserError with the mistakes of all cells, for a stage or figure that is
    not there, and for cells that differ in more than the axes say."""
    base = parse(PipelineFile, read_yaml(sweep.pipeline), sweep.pipeline) if isinstance(sweep.pipeline, str) else sweep.pipeline
    stages = [stage.name for stage in base.stages]
    for what, name in (("stage", sweep.stage), *(("figures", figure.partition(".")[0]) for figure in sweep.figures)):
        if name not in stages:
            raise UserError(f"{what}: {name!r} is no stage of the sweep's pipeline ({', '.join(stages)})")
    cells, mistakes = list[Cell](), dict[str, None]()
    for seed in sweep.seeds:
        for samples in sweep.samples:
            for source, place in (sweep.sources or {ONE: {}}).items():
                for tower, own in sweep.towers.items():
                    values = settings | place | own | {
                        "run.seed": seed, f"{sweep.stage}.run.samples": samples, f"{sweep.stage}.run.epochs": None}
                    folder = out / "-".join([tower, *([source] if sweep.sources else []), str(samples), str(seed)])
                    try:
                        file = with_settings(base, values)
                        cells.append(Cell(tower, source, samples, seed, file, planned_stages(file, [], folder), folder))
                    except UserError as error:
                        mistakes |= dict.fromkeys(f"{tower}: {line}" for line in str(error).splitlines())
    if mistakes:
        raise UserError("\n".join(mistakes))
    said = {name for values in (*sweep.towers.values(), *sweep.sources.values()) for name in values} | {"run.seed"}
    _compare(cells, said, sweep.stage)
    return cells


def with_settings(base: PipelineFile, values: Values) -> PipelineFile:
    """Returns a pipeline with settings that have precedence over its own."""
    names = {stage.name for stage in base.stages}
    own = {name: value for name, value in values.items() if name.partition(".")[0] not in names}
    stages = []
    for stage in base.stages:
        mine = {name.partition(".")[2]: value for name, value in values.items() if name.partition(".")[0] == stage.name}
        kept = {name: value for name, value in stage.settings.items() if name not in own}
        stages.append(stage.model_copy(update={"settings": kept | mine}))
    return base.model_copy(update={"settings": base.settings | own, "stages": stages})


def _compare(cells: list[Cell], said: set[str], stage: str) -> None:
    """Raises UserError for a setting in which cells differ although no axis has it: another setting took it along."""
    first = cells[0]
    for cell in cells[1:]:
        for one, other in zip(first.planned, cell.planned, strict=True):
            changed = differences(_settings(one), _settings(other))
            name = one.entry.name
            known = {text.removeprefix(f"{name}.") for text in said} | ({"run.samples", "run.epochs"} if name == stage else set())
            paths = [line.partition(": ")[0] for line in changed]
            parents = set(one.entry.parents) | {"targets.cached"}
            foreign = [path for path in paths if not any(f"{path}.".startswith(f"{axis}.") for axis in known)
                       and not any(path == parent or path.startswith(f"{parent}.") for parent in parents)]
            if foreign:
                raise UserError(f"stage {name}: the cells {first.name} and {cell.name} differ in {few(foreign)}, which no axis "
                                "of the sweep sets: write it out in towers or sources")


def _settings(stage: PlannedStage) -> Mapping[str, Any]:
    tree = stage.recipe.model_dump(mode="json")
    if stage.entry.text_from is not None:
        tree["student"]["text"].pop("init_from", None)
    return tree
