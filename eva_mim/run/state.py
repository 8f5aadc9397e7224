"""What a stage's folder holds of it: finished, to be gone on with, changed, or nothing. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eva_mim.core.run_folder import RunFolder
from eva_mim.core.settings import differences, digest
from eva_mim.run.recipe import Recipe
from eva_mim.weights.files.read import content_hash


@dataclass(frozen=True)
class StageIdentity:
    """A stage's identity: its settings and the content of its parents."""

    program: str
    settings: dict[str, Any]
    parents: dict[str, dict[str, str]]

    @property
    def identity(self) -> str:
        """Changes when a result would."""
        return digest([self.program, self.settings, {name: parent["sha256"] for name, parent in self.parents.items()}])

    def changes(self, record: dict[str, Any]) -> list[str]:
        """Why an earlier record is not of this stage; empty when it is."""
        if record.get("identity") == self.identity:
            return []
        lines = differences(record.get("settings", {}), self.settings)
        old = record.get("parents", {})
        lines += [f"{name}: other weights" for name, parent in self.parents.items()
                  if parent["sha256"] != old.get(name, {}).get("sha256")]
        return lines or ["settings of another version"]


@dataclass(frozen=True)
class StageState:
    """A stage's identity beside what its folder holds."""

    identity: StageIdentity
    record: dict[str, Any]
    """The lineage record; empty where there is none."""
    resumes: bool
    """A complete checkpoint is there."""
    has_weights: bool
    """The file of a finished stage's weights is there."""

    @property
    def changes(self) -> list[str]:
        """Why the folder holds another stage; empty when it holds this one, or none."""
        return self.identity.changes(self.record) if self.record else []

    @property
    def finished(self) -> bool:
        """The folder holds this very stage, complete."""
        return bool(self.record.get("finished")) and not self.changes and self.has_weights

    @property
    def figures(self) -> str:
        """The recorded metrics as text."""
        return figures(self.record)

    def plan(self) -> str:
        """What running the stage would do, in words."""
        if self.finished:
            return "finished, is skipped"
        if self.changes:
            return "runs again: " + "; ".join(self.changes[:4])
        return "goes on from its checkpoint" if self.record and self.resumes else "runs"


def figures(record: dict[str, Any]) -> str:
    """The metrics of a lineage record as text."""
    return "  ".join(f"{name} {value:.4g}" for name, value in record.get("metrics", {}).items())


def state_of(program: str, recipe: Recipe, out: Path) -> StageState:
    """The state of a stage. Reads its parents whole, for their hashes. Raises UserError when a parent does not exist."""
    parents = {name: {"path": str(path), "sha256": content_hash(path)} for name, path in recipe.parents().items()}
    folder = RunFolder(out)
    return StageState(StageIdentity(program, recipe.identity_tree(), parents), folder.record(), folder.latest() is not None,
                      folder.weights.is_file())
