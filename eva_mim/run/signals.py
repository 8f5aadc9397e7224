"""Signals that ask a run to end: they are collected, and handled at the end of a step."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from eva_mim.core.distributed import is_main, world_size
from eva_mim.core.log import say

WAITING = False
"""True while the main thread waits for a batch; see `interruptible`."""
PATIENCE = 10.0
"""Seconds that a signal waits for a batch where other ranks have to agree on the step at which all stop."""
AGREE = 2.0
"""Seconds between two steps at which several processes agree whether to stop, between log lines. A launcher such as torchrun
kills its processes 30 s after it was asked to end them."""


class Hung(BaseException):
    """A signal came while no batch did. `number` is its number."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


@contextmanager
def interruptible() -> Iterator[None]:
    """In the block, which waits for a batch between two steps, a signal caught by `caught_signals` raises Hung: at once in a run
    of one process, and of several after 10 s, since they agree on a step at which all stop."""
    global WAITING
    WAITING = True
    try:
        yield
    finally:
        WAITING = False


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Yields a list that collects SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 inside the block; a second Ctrl-C raises
    KeyboardInterrupt. Outside the main thread it collects nothing."""
    caught: list[int] = []

    def note(number: int, frame: Any) -> None:
        if number == signal.SIGALRM:
            if WAITING:
                raise Hung(caught[0])
            return
        caught.append(number)
        if is_main():
            _tell(f"  {signal.Signals(number).name}: ending this step, then writing a checkpoint")
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if WAITING and world_size() == 1:
            raise Hung(number)
        if WAITING:
            signal.setitimer(signal.ITIMER_REAL, PATIENCE)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM)
    try:
        before = {number: signal.signal(number, note) for number in numbers}
    except ValueError:  # not in the main thread
        yield caught
        return
    try:
        yield caught
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell(text: str) -> None:
    """Prints a line from a signal handler, which may have come into a write of the same stream: that is not entered twice."""
    try:
        say(text)
    except RuntimeError:  # "reentrant call"
        os.write(2, f"{text}\n".encode())


class Agreement:
    """The ranks of a run agree whether to stop, all at the same step: at log lines, and between these at steps that are about
    `AGREE` seconds apart by the main rank's clock. A process alone need not wait."""

    def __init__(self, device: torch.device):
        self._device = device
        self.restart(0)

    def restart(self, step: int) -> None:
        """Begins at a step, at which all ranks are."""
        self._last, self._at, self._then = step, step, time.monotonic()

    def is_due(self, step: int) -> bool:
        """Returns whether the ranks agree at this step; the same on all ranks."""
        return world_size() == 1 or step >= self._at

    def __call__(self, step: int, number: int, failed: bool) -> tuple[int, bool]:
        """Returns the largest number of a signal that a rank has caught, 0 for none, and whether anything has failed on a rank.
        All ranks must call at the same step. The host waits for the device."""
        if world_size() == 1:
            return number, failed
        now = time.monotonic()
        pace = max(1, step - self._last) / max(now - self._then, 1e-9)
        said = torch.tensor([number, failed, max(1, int(AGREE * pace)) if is_main() else 0], device=self._device)
        torch.distributed.all_reduce(said, op=torch.distributed.ReduceOp.MAX)
        stop, bad, wait = said.tolist()
        self._last, self._at, self._then = step, step + int(wait), now
        return int(stop), bool(bad)
