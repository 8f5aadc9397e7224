"""The folder of a run: the paths of its files, and their readers. `run/checkpoints.py` writes and loads the checkpoints in it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from eva_mim.core.errors import UserError

WEIGHTS, HEAD = "model.safetensors", "head.safetensors"
"""Files of a finished stage: the trunk under timm's names; the tensors of a masked student outside its trunk."""
HEADS_CONFIG = "heads.json"
"""Beside the heads of a masked stage: what each teacher's heads are made of, and which tokens they read."""
ZEROSHOT = "zeroshot.safetensors"
"""Beside the heads of a masked stage: vectors of the classes by a teacher's text tower, [K, C] under the teacher's name."""
SEGMENTATION, VIDEO, PROGRAM = "segmentation.json", "video.json", "program.pt2"
"""Files of a finished segmentation or video stage: its classes, and how images are shown; the whole model, for plain torch."""
TIMM_CONFIG = "config.json"
CLIP_WEIGHTS, CLIP_CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
LINEAGE = "lineage.json"
STORE, STORE_INDEX = "store.json", "index.json"
"""Files of stored features: what they depend on; sizes and hashes of its files, written last."""
MANIFEST = "manifest.json"
"""Manifest of a checkpoint, written last: a folder without it, or with a file of another size, is not a checkpoint."""


def store_index(folder: Path) -> Path:
    """Returns the index of a cache of features. Raises UserError for a folder that is none, and for one that is not whole."""
    if not (folder / STORE).is_file():
        raise UserError(f"{folder} is no cache of features: it has no {STORE}")
    if not (folder / STORE_INDEX).is_file():
        raise UserError(f"{folder}: the cache is not finished; the same `eva-mim cache` command goes on with it")
    return folder / STORE_INDEX


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, given by its path; the folder and its files need not exist."""

    path: Path

    @property
    def weights(self) -> Path:
        """The trunk of a finished stage."""
        return self.path / WEIGHTS

    @property
    def lineage(self) -> Path:
        """The lineage record: identity, parents, versions, figures."""
        return self.path / LINEAGE

    @property
    def settings(self) -> Path:
        """The recipe with all defaults and overrides."""
        return self.path / "resolved.yaml"

    @property
    def metrics(self) -> Path:
        """Log lines, one JSON object each."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def skipped_data(self) -> Path:
        """Data steps that rewinds left out."""
        return self.path / "detours.json"

    @property
    def checkpoints(self) -> Path:
        """The folder of all checkpoints."""
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """Returns the folder of a checkpoint, such as `checkpoints/step-00001234`: names sort as numbers."""
        return self.checkpoints / f"step-{step:08d}"

    def dump(self, step: int) -> Path:
        """Returns the folder of the dump of a run that diverged in `step`."""
        return self.path / "dumps" / f"step-{step:08d}"

    def record(self) -> dict[str, Any]:
        """Reads the lineage record; empty if there is none. Raises UserError if it is damaged."""
        try:
            record: dict[str, Any] = json.loads(self.lineage.read_text()) if self.lineage.is_file() else {}
        except ValueError as error:
            raise UserError(f"{self.lineage} is damaged: {error}") from None
        return record

    def complete(self) -> list[tuple[int, Path]]:
        """Returns (step, folder) of each complete checkpoint, the newest first."""
        folders = sorted(self.checkpoints.glob("step-*"), reverse=True)
        return [(step_of(folder), folder) for folder in folders if is_complete(folder)]

    def latest(self) -> tuple[int, Path] | None:
        """Returns (step, folder) of the newest complete checkpoint, or None."""
        return next(iter(self.complete()), None)

    def log_lines(self) -> list[str]:
        """Reads the lines of `metrics`; a line cut short by a kill is left out."""
        lines = self.metrics.read_text().splitlines() if self.metrics.exists() else []
        return [line for line in lines if _is_json(line)]

    def seconds_at_work(self) -> float:
        """Returns the training time in seconds: the sum between log lines, without the time before a "start" (stopped run)."""
        rows = [json.loads(line) for line in self.log_lines()]
        return float(sum(after["time"] - before["time"] for before, after in pairwise(rows) if after["kind"] != "start"))


def step_of(folder: Path) -> int:
    """Returns the step of a checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))


def file_of(part: str) -> str:
    """Returns the name of the file of a state group."""
    return f"{part}.safetensors"


def is_complete(folder: Path) -> bool:
    """Returns whether every file in the manifest exists and has its size."""
    try:
        files = read_manifest(folder)["files"]
        return all((folder / name).stat().st_size == said["size"] for name, said in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads a checkpoint's manifest. Raises OSError if there is none, ValueError if it is not JSON."""
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return manifest


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    return True


def head_file(folder: Path) -> Path:
    """Returns the file of the heads in the folder of a masked stage. Raises UserError for a folder without one."""
    found = folder / HEAD
    if not found.is_file():
        raise UserError(f"{folder} has no {HEAD}; it must be the folder of a finished masked stage")
    return found
