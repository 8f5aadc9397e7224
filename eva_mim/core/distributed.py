"""Rank helpers that also work without a process group. torch is imported when a function needs it: settings use this file."""

from __future__ import annotations

import itertools
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from eva_mim.core.devices import agreed_device, pick_device, set_arithmetic
from eva_mim.core.errors import LostProcess, UserError
from eva_mim.core.launch import address, launch

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
BEAT = timedelta(seconds=10)
"""Longest interval between heartbeats of a rank that works while others wait."""
LOST = re.compile(r"remote process exited|network error|connection (was )?(closed|reset|refused)|time[d -]*out|watchdog"
                  "|broken pipe|unhandled system error|abort", re.IGNORECASE)
"""What NCCL's errors say when another process or the link to it is gone. Any other one comes again with the next start."""
NCCL_MISTAKES = {
    "duplicate gpu": "two processes share one GPU; start as many processes a host as it has GPUs",
    "out of memory": "no memory is left on the GPU; a smaller run.micro_batch needs less",
    "no socket interface": "no network interface of this host has the name in NCCL_SOCKET_IFNAME; `ip address` lists them",
}
"""Part of an error in small letters -> what to do."""
START = timedelta(minutes=1)
"""Shortest timeout while the processes start: one host may take longer for it than another."""
_turns = itertools.count()
_patience = timedelta(minutes=30)


def rank() -> int:
    """Returns this process's rank, 0 without a launcher."""
    return launch().rank


def world_size() -> int:
    """Returns the number of processes, 1 without a launcher."""
    return launch().world


def local_rank() -> int:
    """Returns this process's rank on its host, 0 without a launcher."""
    return launch().local_rank


def is_main() -> bool:
    """Returns True on rank 0, which writes files and logs."""
    return rank() == 0


def setup(device: str = "auto", minutes: float = 30.0) -> torch.device:
    """Joins the process group if a launcher started more than one process, and sets its timeout in minutes: for collectives, and
    for heartbeats of other ranks in `run_on`. Returns this rank's device, which is torch's current one from here on. fp32
    is exact on GPUs from here on.

    `device`: "auto", "cpu" or "cuda". Raises UserError on every rank if one has no GPU while others have, or shares one.
    """
    global _patience  # one value, since there is one process group
    import torch

    _patience = timedelta(minutes=minutes)
    set_arithmetic()
    found = _join(device) if world_size() > 1 and not grouped() else pick_device(device)
    if found.type == "cuda":
        torch.cuda.set_device(found)
    if grouped():
        set_timeout(minutes)
    return found


def _join(name: str) -> torch.device:
    """Meets the other processes, agrees with them on the devices, and joins their group; returns this rank's device."""
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    host, port = address()
    os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": str(port)}
    timeout = max(START, _patience)
    try:
        store, *_ = next(rendezvous(f"env://?rank={rank()}&world_size={world_size()}", timeout=timeout))
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(f"port {port} of this host is taken by another program; set MASTER_PORT to a free one") from None
    store.set_timeout(timeout)
    device = agreed_device(name, PrefixStore("devices", store))
    gpu = device if device.type == "cuda" else None
    if gpu is not None:
        torch.cuda.set_device(gpu)
    # With `device_id` NCCL starts, or fails, here, and barriers know their GPU.
    dist.init_process_group("nccl" if gpu else "gloo", store=PrefixStore("group", store), rank=rank(),
                            world_size=world_size(), timeout=timeout, device_id=gpu)
    return device


def set_timeout(minutes: float, group: Any = None) -> None:
    """Sets the timeout of collectives in a process group, None for the one of all processes."""
    import torch.distributed as dist

    # torch 2.8 has this function under its private name alone
    change = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    change(timedelta(minutes=minutes), group)


def grouped() -> bool:
    """Returns whether a process group exists."""
    import torch.distributed as dist

    return dist.is_initialized()


@contextmanager
def detect_lost_processes(place: Callable[[], str] = str) -> Iterator[None]:
    """Turns a failed collective and a killed loader process inside the block into LostProcess, and what NCCL calls a mistake into
    UserError; `place()`, the position of the run, is in the message. With nccl, torch's watchdog may end the process first."""
    try:
        yield
    except RuntimeError as error:
        if "torch" not in sys.modules:
            raise
        from torch.distributed import DistBackendError, DistError

        if str(error).startswith("DataLoader worker (pid"):  # torch raises it wherever the main process is
            killed = str(error).removeprefix("DataLoader worker ").split(". ")[0].rstrip(".")
            raise LostProcess(f"rank {rank()}{place()}: a loader process {killed}; where that is the kernel for want of memory, "
                              "fewer data.workers or smaller images help") from error
        if not isinstance(error, DistError) and "gloo/" not in str(error):
            raise
        if isinstance(error, DistBackendError) and "NCCL" in str(error) and not LOST.search(str(error)):
            advice = next((advice for text, advice in NCCL_MISTAKES.items() if text in str(error).lower()), None)
            if advice is None:
                raise
            raise UserError(f"rank {rank()}{place()}: NCCL: {advice}") from error
        why = str(error).split("] ", 1)[-1].split(". This is")[0]
        raise LostProcess(f"rank {rank()}{place()}: another process has gone or does not answer ({why})") from error


def barrier() -> None:
    """Waits for every rank."""
    import torch.distributed as dist

    if grouped():
        dist.barrier()


def leave_group() -> None:
    """Waits for every rank and ends the process group. Without it gloo's threads may outlive Python, which aborts the process."""
    if "torch" in sys.modules and grouped():
        import torch.distributed as dist

        dist.barrier()
        dist.destroy_process_group()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sums the tensor over ranks in place and returns it; unchanged without a group."""
    import torch.distributed as dist

    if grouped():
        dist.all_reduce(tensor)
    return tensor


def broadcast_from_main(tensor: torch.Tensor) -> torch.Tensor:
    """Overwrites the tensor by the main rank's and returns it; unchanged without a group."""
    import torch.distributed as dist

    if grouped():
        dist.broadcast(tensor, 0)
    return tensor


def all_gather_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the rows [rows of all ranks, ...] in the order of ranks; ranks may have different numbers of rows [rows, ...]."""
    import torch
    import torch.distributed as dist

    if not grouped():
        return tensor
    counts = [torch.zeros(1, dtype=torch.int64, device=tensor.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([len(tensor)], device=tensor.device))
    sizes = [int(count) for count in counts]
    padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def run_on(work: Callable[[], T], mine: bool) -> dict[int, T]:
    """Runs `work` on the ranks with `mine=True` while the others wait; returns {rank: result} on all ranks. Every rank must call;
    without a group the result is that of this process. `work` may take longer than the timeout of a collective, since its process
    sends heartbeats. A failure is raised on every rank, on the others as UserError. Raises LostProcess if a rank is gone."""
    if world_size() == 1 or not grouped():
        return {rank(): work()} if mine else {}
    import torch.distributed as dist

    said: tuple[bool, T | None, str | None] = (mine, None, None)
    failure: Exception | None = None
    turn = next(_turns)
    if mine:
        try:
            with _alive(turn):
                said = True, work(), None
        except Exception as error:
            failure, said = error, (True, None, f"{'' if isinstance(error, UserError) else type(error).__name__ + ': '}{error}")
    _meet(turn)
    heard: list[Any] = [None] * world_size()
    dist.all_gather_object(heard, said)
    if failure is not None:
        raise failure
    for number, (_, _, fault) in enumerate(heard):
        if fault is not None:
            raise UserError(f"rank {number}: {fault}")
    return {number: value for number, (did, value, _) in enumerate(heard) if did}


def _store() -> Any:
    import torch.distributed as dist

    return dist.distributed_c10d._get_default_store()


@contextmanager
def _alive(turn: int) -> Iterator[None]:
    """Sends heartbeats while the block runs: increments a counter in the group's store."""
    store, done = _store(), threading.Event()

    def beat() -> None:
        while not done.wait(min(BEAT, _patience / 3).total_seconds()):
            store.add(f"agreed/{turn}/beats", 1)

    heart = threading.Thread(target=beat, daemon=True)
    heart.start()
    try:
        yield
    finally:
        done.set()
        heart.join()


def _meet(turn: int) -> None:
    """Waits until every rank has called, while heartbeats arrive. Raises LostProcess if none arrives within the timeout."""
    import torch.distributed as dist

    try:
        _wait(_store(), f"agreed/{turn}", f"agreed/{turn - 1}")
    except dist.DistNetworkError as error:
        gone = "the process that keeps the group together (rank 0, or its launcher) is gone"
        raise LostProcess(f"rank {rank()}: {gone}: {error}") from None


def _wait(store: Any, turn: str, before: str) -> None:
    if store.add(f"{turn}/here", 1) == world_size():
        store.set(f"{turn}/all", "")
        for name in ("here", "all", "beats"):  # keys of the previous call, which every rank has left
            store.delete_key(f"{before}/{name}")
    began = moved = time.monotonic()
    beats = 0
    while not store.check([f"{turn}/all"]):
        time.sleep(min(1.0, 0.001 + (time.monotonic() - began) / 20))
        if (now := store.add(f"{turn}/beats", 0)) != beats:
            beats, moved = now, time.monotonic()
        elif time.monotonic() - moved > _patience.total_seconds():
            here = f"rank {rank()}: only {store.add(f'{turn}/here', 0)} of {world_size()} processes came this far"
            raise LostProcess(f"{here}, and the others gave no sign of life for {_patience.total_seconds():.0f} s")


def run_on_main(work: Callable[[], T]) -> T:
    """Runs `work` on the main rank; returns its result, or raises its UserError, on every rank. OSError becomes UserError."""

    def told() -> T:
        try:
            return work()
        except OSError as error:
            raise UserError(f"{error.filename or 'a file'}: {error.strerror or error}") from None

    return run_on(told, is_main())[0]
