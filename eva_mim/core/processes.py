"""Pools of processes that end when their parent process ends, even if it is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any


class _Spawned(SpawnProcess):
    def start(self) -> None:
        self.daemon = True  # ended with this process, even if a Ctrl-C comes before the pool has registered it
        # A Ctrl-C in a terminal goes to every process of the group, but only the main process shall handle it. A signal mask is
        # inherited and so holds from the first instruction; a handler that the process installs itself would come too late.
        # (The start of Python's resource tracker would lift the mask, but the pool's locks have started it already.)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Context(SpawnContext):
    Process = _Spawned  # type: ignore[assignment]


def pool_of(processes: int, begin: Callable[..., Any] | None = None, *arguments: Any) -> ProcessPoolExecutor:
    """Returns a pool of processes, each of which calls `begin(*arguments)` first. A script that uses one needs Python's
    `if __name__ == "__main__"`."""
    # Processes are spawned, since a fork of a process with threads may hang.
    return ProcessPoolExecutor(processes, _Context(), _begin, (begin, arguments))


def _begin(begin: Callable[..., Any] | None, arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if begin is not None:
        begin(*arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
