"""Lock of a folder: at most one process writes into it, on one host or on several that share the file system.

filelock's lease does the work. On one host a dead owner is known at once; of an owner on another host a waiter sees that the
lease is renewed every 15 s, or that it was not for 90 s by the waiter's own clock. File locks of the kernel are not used: network
file systems do not always share them.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from filelock import SoftFileLease, Timeout

from eva_mim.core.errors import UserError
from eva_mim.core.files import write_json
from eva_mim.core.log import say

LOCK, OWNER = ".lock", ".lock.json"
"""Names of the lease's marker and of the record of its owner."""
RENEWED, EXPIRED = 15.0, 90.0
"""Seconds between renewals, and without one until the owner is taken for dead. A network file system may show a file's time up to
60 s late (`acregmax` of nfs(5))."""


def lease(path: Path, **options: Any) -> SoftFileLease:
    """Returns filelock's lease with this file's durations, on which all processes have to agree."""
    return SoftFileLease(path, lease_duration=EXPIRED, heartbeat_interval=RENEWED, thread_local=False, **options)


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Holds the folder, which is made if it is missing and removed again if it stays empty. Raises UserError with host, process
    and time if a live process holds it, unless it is to `wait` for that one's end; waits up to 90 s to see whether a process on
    another host lives. A requeued job of Slurm takes the folder of its former start at once."""
    made = not folder.is_dir()
    held = lease(folder / LOCK, on_compromise=lambda lost: _lost(folder, lost.reason))
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _acquire(held, folder, wait=wait)
            write_json(folder / OWNER, _owner())
        except OSError as error:
            raise UserError(f"--out {folder}: {error.strerror or error}; choose another folder") from None
        yield
    finally:
        if held.is_locked and held.is_lock_held_by_us:
            (folder / OWNER).unlink(missing_ok=True)
        held.release()
        if made:
            with suppress(OSError):
                folder.rmdir()


def is_lock(name: str) -> bool:
    """Returns whether a file of a locked folder is one of the lock."""
    return name.startswith(LOCK)


def _acquire(held: SoftFileLease, folder: Path, *, wait: bool) -> None:
    """Raises UserError if another process lives and holds the lease, unless it is to wait."""
    first: int | None = None
    said = False
    while True:
        with suppress(Timeout):
            held.acquire(timeout=0)
            return
        owner, renewed = _read(folder, held.pid), _renewed(folder)
        if owner is not None and (_requeued(owner) or _is_zombie(owner)):
            held.force_break()
            continue
        if (owner is not None and _is_here(owner)) or first not in (None, renewed):
            if not wait:
                raise UserError(f"{folder} is in use by {_named(owner)}; wait until that has ended, or choose another --out")
            if not said:
                say(f"  {folder} is being made by {_named(owner)}; waiting for it")
            said = True
        elif first is None and renewed is not None:
            first = renewed
            say(f"  {folder} is held by {_named(owner)}; waiting up to {EXPIRED:.0f} s to see whether it is alive")
        time.sleep(min(1.0, RENEWED / 4))


def _owner() -> dict[str, Any]:
    """Returns the record of this process as an owner."""
    return {"host": socket.gethostname(), "namespace": _namespace(), "process": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"), "job": _job()}


def _namespace() -> int | None:
    """Returns the number of this process's PID namespace: containers may share a host's name, but not its processes."""
    with suppress(OSError):
        return os.stat("/proc/self/ns/pid").st_ino
    return None


def _job() -> list[Any] | None:
    """Returns [id, number of restarts] of this process's Slurm job."""
    job = os.environ.get("SLURM_JOB_ID")
    return None if job is None else [job, int(os.environ.get("SLURM_RESTART_COUNT") or 0)]


def _requeued(owner: dict[str, Any]) -> bool:
    """Returns whether this process is a later start of the owner's Slurm job: Slurm has ended the former one."""
    before, now = owner.get("job"), _job()
    return before is not None and now is not None and before[0] == now[0] and before[1] < now[1]


def _is_zombie(owner: dict[str, Any]) -> bool:
    """Returns whether the owner was killed on this host and nobody has asked for its exit code, as in containers whose first
    process is no init: it has a number, but does not live."""
    with suppress(psutil.Error):
        return _is_here(owner) and psutil.Process(owner["process"]).status() == psutil.STATUS_ZOMBIE
    return False


def _is_here(owner: dict[str, Any]) -> bool:
    return (owner["host"], owner["namespace"]) == (socket.gethostname(), _namespace())


def _named(owner: dict[str, Any] | None) -> str:
    return "another process" if owner is None else f"process {owner['process']} on {owner['host']} since {owner['since']}"


def _read(folder: Path, process: int | None) -> dict[str, Any] | None:
    """Returns the record of the process that holds the lease; None before it is written."""
    with suppress(OSError, ValueError):
        found = json.loads((folder / OWNER).read_text())
        if isinstance(found, dict) and {"host", "namespace", "process", "since"} <= found.keys() and found["process"] == process:
            return found
    return None


def _renewed(folder: Path) -> int | None:
    """Returns when the lease was renewed, by the file system's clock."""
    with suppress(OSError):
        return os.stat(folder / LOCK).st_mtime_ns
    return None


def _lost(folder: Path, reason: str) -> None:
    """Ends the process at once if another one has taken the folder: what it writes from now on would mix with the other's."""
    if reason != "owner-changed":  # a file system that cannot be reached, or a folder that was moved
        say(f"  {folder / LOCK} cannot be renewed ({reason}): another process may take the folder")
        return
    with suppress(OSError):
        other = _named(_read(folder, lease(folder / LOCK).pid))
        sys.stderr.write(f"error: {folder} was taken by {other}, since this process did not renew its lock for {EXPIRED:.0f} s; "
                         "it ends\n")
        sys.stderr.flush()
    os._exit(UserError.exit_code)
