"""State of a stage in its folder: finished, resumable, changed or new. This file imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from eva_mim.core.errors import UserError
from eva_mim.core.run_folder import RunFolder
from eva_mim.core.settings import completed, differences, digest
from eva_mim.run.console import wrapped
from eva_mim.run.recipe import Recipe


@dataclass(frozen=True)
class StageIdentity:
    """A stage's identity: its settings and the content of its parents."""

    program: str
    settings: dict[str, Any]
    parents: dict[str, dict[str, str]]
    places: dict[str, str] = field(default_factory=dict)
    """Settings that say where the data lies, by dotted name. They are no part of the identity: the records themselves are
    compared (`run.stage.settled`)."""

    recipe: Recipe | None = None
    """Tells which settings have their defaults; None: all count."""

    @property
    def identity(self) -> str:
        """Digest that changes when settings or parents that the result depends on change."""
        return _digest(self.program, self.settings, self.parents)

    def changes(self, record: dict[str, Any]) -> list[str]:
        """Returns the differences of an earlier lineage record from this stage, as lines; empty if it is of this stage. A setting
        that the record lacks, because an earlier version wrote it, is none while it has its default."""
        if record.get("identity") == self.identity:
            return []
        before, old = record.get("settings", {}), record.get("parents", {})
        if self.recipe is not None:
            before = completed(before, self.recipe, self.settings)
            if _digest(record.get("program", self.program), before, old) == self.identity:
                return []
        lines = differences(before, self.settings)
        lines += differences(record.get("places", {}), self.places)
        lines += [f"{name}: other weights" for name, parent in self.parents.items()
                  if parent["sha256"] != old.get(name, {}).get("sha256")]
        return lines or ["settings of another version"]


def _digest(program: str, settings: dict[str, Any], parents: dict[str, dict[str, str]]) -> str:
    return digest([program, settings, {name: parent["sha256"] for name, parent in parents.items()}])


@dataclass(frozen=True)
class StageState:
    """Identity of a stage and content of its folder."""

    identity: StageIdentity
    record: dict[str, Any]
    """The lineage record; empty if there is none."""
    resumes: bool
    """True if the folder has a complete checkpoint."""
    has_weights: bool
    """True if the folder has the weight file of a finished stage."""

    other_records: bool = False
    """True if the data at another place was compared with the run's, and its records are others."""

    @property
    def changes(self) -> list[str]:
        """Differences of the folder's stage from this one, as lines; empty if it is this stage, or there is none."""
        if not self.record:
            return []
        others = [f"{line}, with other records" for line in self.moved] if self.other_records else []
        return self.identity.changes(self.record) or others

    @property
    def moved(self) -> list[str]:
        """Differences in where the data lies, as lines; empty without a record."""
        return differences(self.record["places"], self.identity.places) if "places" in self.record else []

    @property
    def compares_data(self) -> bool:
        """True if the data must be opened to see whether the folder has this stage, since it lies at another place."""
        return bool(self.moved) and not self.changes

    @property
    def finished(self) -> bool:
        """True if the folder has this stage with the same identity, finished."""
        return bool(self.record.get("finished")) and not self.changes and not self.moved and self.has_weights

    def compared(self, same: bool) -> StageState:
        """Returns the state after the data at another place was compared."""
        return replace(self, record=self.record | {"places": self.identity.places}) if same else replace(self, other_records=True)

    def nothing_to_do(self, out: Path) -> str:
        """Returns what the program of a finished stage says: its folder, and its figures in lines of at most 80 columns."""
        return f"{out}: finished before, nothing to do\n{wrapped('', self.record.get('metrics', {}))}"

    def reread(self, out: Path) -> StageState:
        """Returns the state of this stage with what the folder holds now; the parents are not read again."""
        return _in_folder(self.identity, out)

    def plan(self) -> str:
        """Returns in words whether the stage would be skipped, run again, resumed or run."""
        if self.finished:
            return "finished, is skipped"
        if self.changes:
            return "runs again: " + "; ".join(self.changes[:4])
        if self.moved:
            return f"compares its data first: {'; '.join(self.moved[:4])}"
        return "goes on from its checkpoint" if self.record and self.resumes else "runs"


def state_of(program: str, recipe: Recipe, out: Path) -> StageState:
    """Returns the state of a stage. It reads all bytes of its parents, for their hashes. Raises UserError if a parent does not
    exist, and if `out` is a parent's folder or lies among the images."""
    _refuse_occupied(recipe, out)
    parents = {}
    for name, path in recipe.parents().items():
        if not path.exists():
            maker = "`eva-mim cache` writes it" if name == "targets.cached" else "where another stage leaves it, run that first"
            raise UserError(f"{name}: {path} does not exist; {maker}, else name what is there")
        try:
            parents[name] = {"path": str(path), "sha256": recipe.parent_hash(name, path)}
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    return _in_folder(StageIdentity(program, recipe.identity_tree(), parents, recipe.places(), recipe), out)


def _refuse_occupied(recipe: Recipe, out: Path) -> None:
    place = out.resolve()
    taken = {name: path.resolve() for name, path in recipe.parents().items()}
    for section, source in recipe.data.sources.items():
        if source.root is None:
            continue
        taken[f"{section}.root"] = source.root.resolve()
        for split in ("train", "val") if source.source == "folder" else ():
            images = (source.root / (getattr(source, split) or "")).resolve()
            if images in place.parents and (getattr(source, split) or split == "train"):
                raise UserError(f"--out {out} lies in {section}.root={source.root}, among the images, and would be taken for a "
                                "class; choose a folder elsewhere")
    for name, path in taken.items():
        if path == place:
            raise UserError(f"--out {out} is the folder of {name}; choose another one, which the run may fill")


def _in_folder(identity: StageIdentity, out: Path) -> StageState:
    folder = RunFolder(out)
    return StageState(identity, folder.record(), folder.latest() is not None, folder.weights.is_file())
