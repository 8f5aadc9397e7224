"""Where a run's checkpoints lie, and which of them are whole. `snapshot.py` writes and reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
"""Written last; a folder without it, or with a file of another size, is not a checkpoint."""


def folder_of(out: Path, step: int) -> Path:
    """`OUT/checkpoints/step-00001234`: names sort as numbers."""
    return out / "checkpoints" / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The inverse of `folder_of`."""
    return int(folder.name.removeprefix("step-"))


def file_of(part: str) -> str:
    """Name of the file that holds a part."""
    return f"{part}.safetensors"


def complete(out: Path) -> list[tuple[int, Path]]:
    """(step, folder) of each whole checkpoint, the newest first."""
    folders = sorted((out / "checkpoints").glob("step-*"), reverse=True)
    return [(step_of(folder), folder) for folder in folders if is_complete(folder)]


def latest(out: Path) -> tuple[int, Path] | None:
    """(step, folder) of the newest whole checkpoint, or None."""
    return next(iter(complete(out)), None)


def is_complete(folder: Path) -> bool:
    """Every file of the manifest is there with its size."""
    try:
        files = read_manifest(folder)["files"]
        return all((folder / name).stat().st_size == said["size"] for name, said in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises OSError or ValueError where there is none."""
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return manifest
