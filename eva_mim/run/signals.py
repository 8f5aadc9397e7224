"""Signals that ask a run to end: they are collected, and handled at the end of a step."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from eva_mim.core.distributed import is_main
from eva_mim.core.log import say


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Yields a list that collects SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 inside the block; a second Ctrl-C raises
    KeyboardInterrupt. Outside the main thread it collects nothing."""
    caught: list[int] = []

    def note(number: int, frame: Any) -> None:
        caught.append(number)
        if is_main():
            say(f"  {signal.Signals(number).name}: ending this step, then writing a checkpoint")
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    try:
        before = {number: signal.signal(number, note) for number in numbers}
    except ValueError:  # not in the main thread
        yield caught
        return
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

