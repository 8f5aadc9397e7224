"""Checkpoints of a run: written beside their final name, renamed when whole, pruned afterwards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from eva_mim.contracts import Engine
from eva_mim.distributed import barrier, is_main
from eva_mim.files import write_json

MANIFEST = "manifest.json"
"""Written last; a folder without it, or with a file of another size, is not a checkpoint."""


def folder_of(out: Path, step: int) -> Path:
    """`OUT/checkpoints/step-00001234`: names sort as numbers."""
    return out / "checkpoints" / f"step-{step:08d}"


def save(out: Path, step: int, engine: Engine, extra: Callable[[Path], None], keep_last: int) -> Path:
    """Save on all ranks; `extra(folder)` adds the main rank's own files."""
    target = folder_of(out, step)
    temporary = target.with_name(f"tmp-{target.name}")
    if is_main():
        for stale in target.parent.glob("tmp-*"):
            shutil.rmtree(stale)
        temporary.mkdir(parents=True)
    barrier()
    engine.save(temporary)
    barrier()
    if is_main():
        extra(temporary)
        sizes = {
            str(path.relative_to(temporary)): path.stat().st_size
            for path in sorted(temporary.rglob("*"))
            if path.is_file()
        }
        write_json(temporary / MANIFEST, {"step": step, "files": sizes})
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
        for old in sorted(target.parent.glob("step-*"))[:-keep_last]:
            shutil.rmtree(old)
    barrier()
    return target


def latest(out: Path) -> tuple[int, Path] | None:
    """(step, folder) of the newest whole checkpoint, or None."""
    for folder in sorted((out / "checkpoints").glob("step-*"), reverse=True):
        if is_whole(folder):
            return int(folder.name.removeprefix("step-")), folder
    return None


def is_whole(folder: Path) -> bool:
    """Every file of the manifest is there with its size."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return all((folder / name).stat().st_size == size for name, size in manifest["files"].items())
    except (OSError, ValueError, KeyError):
        return False
