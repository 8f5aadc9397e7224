"""Time of a step by phase: data, teacher, student, backward, optimizer. Measuring does not synchronise the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Stopwatch:
    """Sums seconds by phase. On CUDA a pair of events marks a phase; `take` reads them."""

    def __init__(self, cuda: bool = False, clock: Callable[[], float] = time.perf_counter):
        self.cuda, self._clock = cuda, clock
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Times a block as phase `name`."""
        if not self.cuda:
            started = self._clock()
            try:
                yield
            finally:
                self._seconds[name] = self._seconds.get(name, 0.0) + self._clock() - started
            return
        import torch

        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        first.record()
        try:
            yield
        finally:
            last.record()
            self._events.append((name, first, last))

    def take(self) -> dict[str, float]:
        """Returns seconds by phase since the last call (on CUDA it synchronises the device)."""
        for name, first, last in self._events:
            last.synchronize()
            self._seconds[name] = self._seconds.get(name, 0.0) + first.elapsed_time(last) / 1000
        taken, self._seconds, self._events = self._seconds, {}, []
        return taken


_running: list[Stopwatch] = []


@contextmanager
def measuring(stopwatch: Stopwatch) -> Iterator[None]:
    """Times the blocks marked with `phase` inside this one, with `stopwatch`."""
    _running.append(stopwatch)
    try:
        yield
    finally:
        _running.pop()


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Marks a block as a phase; without a stopwatch it costs nothing."""
    if not _running:
        yield
        return
    with _running[-1](name):
        yield
