"""Pools of processes that end with the one that made them, however it ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from typing import Any


def pool_of(processes: int, begin: Callable[..., Any] | None = None, *arguments: Any) -> ProcessPoolExecutor:
    """`begin(*arguments)` is called in each process first. A script that uses one needs Python's `if __name__ == "__main__"`."""
    # Spawned: a fork of a process with threads may hang.
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _begin, (begin, arguments))
    with suppress(ValueError):  # not in the main thread
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: the main process decides
        try:
            pool.submit(int)  # the first starts all processes
        finally:
            signal.signal(signal.SIGINT, before)
    return pool


def _begin(begin: Callable[..., Any] | None, arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
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
