"""Pools of processes that end with the one that made them, however it ends."""

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
        self.daemon = True  # ended with this process, even if a Ctrl-C comes before the pool knows of it
        # A Ctrl-C in a terminal goes to every process of the group; here the main one decides. The mask is inherited, so it holds
        # from the first instruction, which a handler set by the process itself would not. (Python's resource tracker, whose start
        # ends such a mask, runs already: the pool's locks have started it.)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Context(SpawnContext):
    Process = _Spawned  # type: ignore[assignment]


def pool_of(processes: int, begin: Callable[..., Any] | None = None, *arguments: Any) -> ProcessPoolExecutor:
    """`begin(*arguments)` is called in each process first. A script that uses one needs Python's `if __name__ == "__main__"`."""
    # Spawned: a fork of a process with threads may hang.
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
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
