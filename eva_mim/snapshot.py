"""Checkpoints of a run: whole tensors under their names, one in memory at a time; the same for every engine, ZeRO stage and
number of processes. Written beside their final name, renamed when they are on the disk, pruned afterwards; checked when read."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eva_mim.checkpoint import MANIFEST, file_of, folder_of, latest, read_manifest, step_of, whole
from eva_mim.config import UserError, few
from eva_mim.contracts import Part
from eva_mim.convert.reading import Checkpoint, open_checkpoint
from eva_mim.convert.writing import bytes_of, in_file_order, stream_safetensors
from eva_mim.distributed import is_main, on_main, world_size
from eva_mim.files import flush_folder, sha256, write_json
from eva_mim.log import say

ROUNDING = 1e-9
"""Relative difference of a norm in fp64 by the order of its sum."""


def kept_here(tensors: Mapping[str, Tensor]) -> Part:
    """A part whose tensors are whole on every rank."""
    kinds = {name: (str(value.dtype).removeprefix("torch."), tuple(value.shape)) for name, value in tensors.items()}

    def put(name: str, value: Tensor) -> None:
        tensors[name].data.copy_(value)

    return Part(kinds, lambda name: tensors[name], put)


def save(
    out: Path, step: int, parts: Mapping[str, Part], facts: Mapping[str, Any], *, keep_last: int, keep_every: int | None = None
) -> Path:
    """Save on all ranks. `facts` are plain values for `load` to give back. Raises UserError on every rank, for a full disk for
    example; then the checkpoints from before are as they were, and nothing is left of this one."""
    target = folder_of(out, step)
    temporary = target.with_name(f"tmp-{target.name}")
    try:
        on_main(partial(_begin, temporary, sum(bytes_of(part.kinds) for part in parts.values())))
        norms = {name: _write(temporary / file_of(name), part) for name, part in parts.items()}
        manifest = {"step": step, "processes": world_size(), "norms": norms, "facts": dict(facts)}
        on_main(partial(_finish, temporary, target, manifest))
    except UserError as error:
        if is_main():
            shutil.rmtree(temporary, ignore_errors=True)
        before = latest(out)
        stays = "there is no checkpoint" if before is None else f"the checkpoint of step {before[0]} is whole"
        raise UserError(f"step {step} was not saved: {error}\n  {stays}; the same command goes on from there") from None
    on_main(partial(_prune, target, keep_last, keep_every))
    return target


def newest(out: Path) -> tuple[int, Path] | None:
    """(step, folder) of the newest checkpoint whose files have their hashes, or None where a run has none; on all ranks alike.
    Raises UserError where every one is damaged."""

    def search() -> tuple[int, Path] | None:
        folders = whole(out)
        for step, folder in folders:
            if not (damaged := _damaged(folder)):
                return step, folder
            say(f"  {folder}: {damaged} is not as it was written; the checkpoint is left out")
        if folders:
            raise UserError(f"{out}: every checkpoint is damaged; to train from the start again, remove {out / 'checkpoints'}")
        return None

    return on_main(search)


def load(folder: Path, parts: Mapping[str, Part]) -> dict[str, Any]:
    """Put a checkpoint back on all ranks; returns its facts. Raises UserError where names, shapes or, after all is done, the norm
    of a part is not what it should be: never a part of a load."""
    manifest = read_manifest(folder)
    if "norms" not in manifest:
        raise UserError(f"{folder} has the format of an earlier version, which cannot be resumed; its weights can be read: "
                        f"start another run with init_from={folder}, or use eva-mim convert")
    if set(manifest["norms"]) != set(parts):
        raise UserError(f"{folder} holds {', '.join(sorted(manifest['norms']))}, but this run keeps {', '.join(sorted(parts))}")
    opened = {name: open_checkpoint(folder / file_of(name)) for name in parts}
    for name, part in parts.items():
        _same(opened[name], part)
    for name, part in parts.items():
        for tensor in in_file_order(part.kinds):
            part.put(tensor, opened[name][tensor])
    for name, part in parts.items():  # of what arrived, wherever it lies now
        norm, squares = manifest["norms"][name], list(map(_square, _whole(part)))
        on_main(partial(_equal, f"{folder / file_of(name)}", norm, math.sqrt(sum(squares))))
    facts: dict[str, Any] = manifest["facts"]
    return facts


def _begin(temporary: Path, need: int) -> None:
    """An empty folder on a disk with room for `need` bytes."""
    for stale in temporary.parent.glob("tmp-*"):
        shutil.rmtree(stale)
    temporary.mkdir(parents=True)
    free = shutil.disk_usage(temporary).free
    if need > free:
        raise UserError(f"it needs {need:,} bytes, but {free:,} are free in {temporary.parent}; make room")


def _whole(part: Part) -> Iterator[Tensor]:
    for name in in_file_order(part.kinds):
        yield part.read(name).detach().cpu()


def _write(path: Path, part: Part) -> float:
    """The part's file; returns the norm of all its elements (on the main rank)."""
    squares, fault = [0.0], list[UserError]()

    def noting() -> Iterator[Tensor]:
        for value in _whole(part):
            squares.append(_square(value) if is_main() else 0.0)
            yield value

    values = noting()
    if is_main():
        try:
            stream_safetensors(path, part.kinds, values)
        except UserError as error:
            fault.append(error)
    for _ in values:  # reading takes every rank, also where the main rank has stopped writing
        pass
    on_main(partial(_raise, fault))
    return math.sqrt(sum(squares))


def _raise(fault: list[UserError]) -> None:
    if fault:
        raise fault[0]


def _square(value: Tensor) -> float:
    wide = value if value.is_floating_point() else value.double()
    return float(torch.linalg.vector_norm(wide, dtype=torch.float64)) ** 2


def _finish(temporary: Path, target: Path, manifest: dict[str, Any]) -> None:
    files = {path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in sorted(temporary.iterdir())}
    write_json(temporary / MANIFEST, manifest | {"files": files})
    flush_folder(temporary)
    if target.exists():  # damaged, or its step was done again
        shutil.rmtree(target)
    os.rename(temporary, target)
    flush_folder(target.parent)


def _prune(target: Path, keep_last: int, keep_every: int | None) -> None:
    """Remove old checkpoints, and any that is ahead: it was damaged, or the run has gone back."""
    folders = sorted(target.parent.glob("step-*"))
    ahead = [folder for folder in folders if folder > target]
    old = folders[: len(folders) - len(ahead)][:-keep_last]
    for folder in ahead + [one for one in old if not keep_every or step_of(one) % keep_every]:
        shutil.rmtree(folder)


def _damaged(folder: Path) -> str | None:
    """The first file that is not as its hash says."""
    for name, said in read_manifest(folder)["files"].items():
        if isinstance(said, dict) and sha256(folder / name) != said["sha256"]:
            return str(name)
    return None


def _same(opened: Checkpoint, part: Part) -> None:
    """Raise UserError unless the file has exactly the names, types and shapes that are wanted."""
    dtypes, shapes = opened.dtypes(), opened.shapes()
    found = {name: (dtypes[name], shapes[name]) for name in opened}
    wrong = [f"{name}: missing" for name in part.kinds if name not in found]
    wrong += [f"{name}: unknown" for name in found if name not in part.kinds]
    wrong += [f"{name}: {found[name]} instead of {kind}" for name, kind in part.kinds.items() if name in found
              and (found[name][0], tuple(found[name][1])) != kind]
    if wrong:
        raise UserError(f"{opened.path} does not fit this run: {few(wrong, 5)}")


def _equal(path: str, wanted: float, found: float) -> None:
    if not math.isclose(found, wanted, rel_tol=ROUNDING) and not (math.isnan(found) and math.isnan(wanted)):
        raise UserError(f"{path}: what was loaded has the norm {found!r}, what was saved had {wanted!r}; a run does not go on "
                        "with a part of a checkpoint")
