"""Signals that ask a run to end: they are collected, and handled at the end of a step."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from eva_mim.core.distributed import is_main, world_size
from eva_mim.core.log import say

WAITING = False
"""True while the main thread waits for a batch; see `interruptible`."""
PATIENCE = 10.0
"""Seconds that a signal waits for a batch where other ranks have to agree on the step at which all stop."""


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
            say(f"  {signal.Signals(number).name}: ending this step, then writing a checkpoint")
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

