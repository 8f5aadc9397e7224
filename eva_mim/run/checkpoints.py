"""Checkpoints of a run: full tensors under their names, the same for every engine, ZeRO stage and number of processes.
A checkpoint is written under a temporary name while training goes on, renamed when it is on the disk, and checked when read."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from eva_mim.core.contracts import StateGroup
from eva_mim.core.distributed import is_main, run_on_main, world_size
from eva_mim.core.errors import UserError
from eva_mim.core.files import flush_folder, sha256, write_json
from eva_mim.core.host_copy import to_host
from eva_mim.core.log import say
from eva_mim.core.run_folder import MANIFEST, RunFolder, file_of, read_manifest, step_of
from eva_mim.core.settings import few
from eva_mim.weights.files.read import Checkpoint, open_checkpoint
from eva_mim.weights.files.write import Kinds, bytes_of, in_file_order, stream_safetensors

ROUNDING = 1e-9
"""Relative tolerance of a norm in fp64, which depends on the order of summation."""
ROOM = 0.5
"""Share of the free memory that the copy of a checkpoint may take; the rest is left to training."""
Values = Mapping[str, Iterable[Tensor]]
"""Tensors `in_file_order` by the name of their state group."""


def kept_here(tensors: Mapping[str, Tensor]) -> StateGroup:
    """Returns a state group of tensors that every rank has in full."""
    kinds = {name: (str(value.dtype).removeprefix("torch."), tuple(value.shape)) for name, value in tensors.items()}

    def put(name: str, value: Tensor) -> None:
        tensors[name].data.copy_(value)

    return StateGroup(kinds, lambda name: tensors[name], put)


class Writer:
    """Saves a run's checkpoints, one at a time: each is copied to the main rank's memory, and a thread writes it from there.
    If the memory does not suffice for the copy, training waits until the checkpoint is written. Every rank has a writer and makes
    the same calls."""

    def __init__(self, out: Path, *, keep_last: int, keep_every: int | None = None):
        self._write = partial(_write, out, keep_last=keep_last, keep_every=keep_every)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._end: Future[None] | None = None
        self._step: int | None = None
        """Step of the checkpoint that is being written; `_end` is its future on the main rank."""
        self._told = False

    def save(self, step: int, parts: Mapping[str, StateGroup], facts: Mapping[str, Any]) -> None:
        """Starts to write a checkpoint, after the previous one has been written. After the call the tensors may change. `facts`
        are plain values that `load` returns. Raises the errors of `finish`."""
        self.finish(held=True)
        kinds = {name: part.kinds for name, part in parts.items()}
        manifest = {"step": step, "processes": world_size(), "facts": dict(facts)}
        work = partial(self._write, manifest, kinds)
        values: Values = {name: _whole(part) for name, part in parts.items()}
        copied = run_on_main(partial(self._fits, sum(map(bytes_of, kinds.values()))))
        if is_main():
            if copied:
                values = {name: to_host(tensors) for name, tensors in values.items()}
            self._end = self._thread.submit(work, values) if copied else _at_once(work, values)
        for tensors in values.values():  # every rank must read, even if the main rank has stopped writing
            deque(tensors, maxlen=0)
        self._step = step
        if not copied:
            self.finish()

    def failed(self) -> bool:
        """Returns whether writing has failed, so that `finish` would raise. It does not wait; True on the main rank only."""
        return self._end is not None and self._end.done() and self._end.exception() is not None

    def finish(self, *, held: bool = False) -> None:
        """Waits for the checkpoint that is being written. Raises UserError on every rank if writing failed, for example on a full
        disk; earlier checkpoints are then unchanged, and its files are removed. `held`: training waits, which is printed."""
        step, self._step = self._step, None
        if step is not None:
            run_on_main(partial(self._wait, step, held))

    def close(self) -> None:
        """Waits on this rank for the thread, and ignores a failure."""
        self._thread.shutdown()

    def _wait(self, step: int, held: bool) -> None:
        assert self._end is not None
        end, self._end, began = self._end, None, time.perf_counter()
        end.result()
        if held and (waited := time.perf_counter() - began) > 1:
            say(f"  training waited {waited:.1f} s for the checkpoint of step {step} to be written; "
                "with a larger run.checkpoint_every it does not")

    def _fits(self, need: int) -> bool:
        free = available_memory()
        fits = need <= ROOM * free
        if not fits and not self._told:
            self._told = True
            say(f"  training is held while a checkpoint is written: a copy takes {need:,} bytes of memory, and {free:,} are free")
        return fits


def available_memory(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Returns the bytes of memory available to this process, limited by the machine and by its control groups (Linux, v2); cached
    files count as free."""
    free = int(psutil.virtual_memory().available)
    with suppress(OSError, IndexError):
        group = groups / Path("/proc/self/cgroup").read_text().split("0::/", 1)[1].split("\n")[0]
        for folder in (group, *group.parents):
            if (folder / "memory.max").exists() and (limit := (folder / "memory.max").read_text().strip()) != "max":
                fields = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                used = int((folder / "memory.current").read_text()) - int(fields["active_file"]) - int(fields["inactive_file"])
                free = min(free, int(limit) - used)
    return free


def newest(out: Path) -> tuple[int, Path] | None:
    """Returns (step, folder) of the newest checkpoint whose files match their hashes, on all ranks; None if the run has no
    checkpoint. Raises UserError if all checkpoints are damaged."""

    def search() -> tuple[int, Path] | None:
        folders = RunFolder(out).complete()
        for step, folder in folders:
            if not (damaged := _damaged(folder)):
                return step, folder
            say(f"  {folder}: {damaged} is not as it was written; the checkpoint is left out")
        if folders:
            raise UserError(f"{out}: every checkpoint is damaged; to train from the start again, remove {folders[0][1].parent}")
        return None

    return run_on_main(search)


def load(folder: Path, parts: Mapping[str, StateGroup], *, alone: bool = False) -> dict[str, Any]:
    """Loads a checkpoint on all ranks; returns its facts. `alone`: only these state groups are loaded, for a module that is not
    trained further. Raises UserError if names, types or shapes differ, or if the norm of a loaded group differs from the saved
    one, so that no run continues from an incomplete load."""
    manifest = run_on_main(partial(read_manifest, folder))
    if not (set(manifest["norms"]) >= set(parts) if alone else set(manifest["norms"]) == set(parts)):
        raise UserError(f"{folder} holds {', '.join(sorted(manifest['norms']))}, but this run keeps {', '.join(sorted(parts))}")
    opened = {name: open_checkpoint(folder / file_of(name)) for name in parts}
    for name, part in parts.items():
        _same(opened[name], part)
    for name, part in parts.items():
        for tensor in in_file_order(part.kinds):
            part.put(tensor, opened[name][tensor])
    for name, part in parts.items():  # norms of the loaded tensors, read from where the engine keeps them
        norm, squares = manifest["norms"][name], list(map(_square, _whole(part)))
        run_on_main(partial(_equal, f"{folder / file_of(name)}", norm, math.sqrt(sum(squares))))
    facts: dict[str, Any] = manifest["facts"]
    return facts


def _write(
    out: Path, manifest: dict[str, Any], kinds: Mapping[str, Kinds], values: Values, *, keep_last: int, keep_every: int | None
) -> None:
    """Writes a checkpoint and removes old ones; only the main rank calls it. Raises UserError."""
    step = manifest["step"]
    target = RunFolder(out).checkpoint(step)
    temporary = target.with_name(f"tmp-{target.name}")
    try:
        _begin(temporary, sum(map(bytes_of, kinds.values())))
        norms = {name: _write_part(temporary / file_of(name), kinds[name], values[name]) for name in kinds}
        _finish(temporary, target, manifest | {"norms": norms})
    except (UserError, OSError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        before = RunFolder(out).latest()
        stays = "there is no checkpoint" if before is None else f"the checkpoint of step {before[0]} is complete"
        raise UserError(f"step {step} was not saved: {error}\n  {stays}; the same command goes on from there") from None
    _prune(target, keep_last, keep_every)


def _at_once(work: Callable[[Values], None], values: Values) -> Future[None]:
    """Runs `work` now and returns a finished Future."""
    end = Future[None]()
    try:
        work(values)
        end.set_result(None)
    except Exception as error:
        end.set_exception(error)
    return end


def _begin(temporary: Path, need: int) -> None:
    """Creates an empty folder. Raises UserError if its disk has less than `need` bytes free."""
    for stale in temporary.parent.glob("tmp-*"):
        shutil.rmtree(stale)
    temporary.mkdir(parents=True)
    free = shutil.disk_usage(temporary).free
    if need > free:
        raise UserError(f"it needs {need:,} bytes, but {free:,} are free in {temporary.parent}; make room")


def _whole(part: StateGroup) -> Iterator[Tensor]:
    for name in in_file_order(part.kinds):
        yield part.read(name).detach()


def _write_part(path: Path, kinds: Kinds, values: Iterable[Tensor]) -> float:
    """Writes the file of a state group; returns the norm of all its elements."""
    squares = [0.0]

    def noting() -> Iterator[Tensor]:
        for value in values:
            squares.append(_square(value))
            yield value

    stream_safetensors(path, kinds, noting())
    return math.sqrt(sum(squares))


def _square(value: Tensor) -> float:
    wide = value if value.is_floating_point() else value.double()
    return float(torch.linalg.vector_norm(wide, dtype=torch.float64)) ** 2


def _finish(temporary: Path, target: Path, manifest: dict[str, Any]) -> None:
    files = {path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in sorted(temporary.iterdir())}
    write_json(temporary / MANIFEST, manifest | {"files": files})
    flush_folder(temporary)
    if target.exists():  # a damaged checkpoint, or the step was run again
        shutil.rmtree(target)
    os.rename(temporary, target)
    flush_folder(target.parent)


def _prune(target: Path, keep_last: int, keep_every: int | None) -> None:
    """Removes old checkpoints, and any of a later step: it is damaged, or from before a rewind."""
    folders = sorted(target.parent.glob("step-*"))
    ahead = [folder for folder in folders if folder > target]
    old = folders[: len(folders) - len(ahead)][:-keep_last]
    for folder in ahead + [one for one in old if not keep_every or step_of(one) % keep_every]:
        shutil.rmtree(folder)


def _damaged(folder: Path) -> str | None:
    """Returns the first file whose hash differs from the manifest; None if all match."""
    for name, said in read_manifest(folder)["files"].items():
        if sha256(folder / name) != said["sha256"]:
            return str(name)
    return None


def _same(opened: Checkpoint, part: StateGroup) -> None:
    """Raises UserError unless the file has exactly the names, types and shapes of the state group."""
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
