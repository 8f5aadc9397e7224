"""Errors that end a program. Each has an exit code, and is printed as a message without a traceback."""

from __future__ import annotations

import signal


class ProgramError(Exception):
    """Base of the errors that end a program; any other exception is a fault of the code and keeps its traceback."""

    exit_code = 1

    def message(self) -> str:
        """Returns the text for the terminal."""
        return f"error: {self}"


class UserError(ProgramError, ValueError):
    """A mistake in the user's settings, files or arguments. It is a ValueError, so that pydantic collects it from a validator."""

    exit_code = 2


class Diverged(ProgramError):
    """The gradient stays non-finite after every rewind that the settings allow. The message has the dump's path."""

    exit_code = 3

    def message(self) -> str:
        """Returns the text for the terminal."""
        return f"diverged: {self}"


class LostProcess(ProgramError):
    """Another process of the run has ended or does not answer in time. See its own log to decide whether to restart."""

    exit_code = 69
    """EX_UNAVAILABLE."""

    def message(self) -> str:
        """Returns the text for the terminal."""
        return f"error: {self}; if it was a fault of its host, the same command goes on from the last checkpoint"


class Interrupted(ProgramError):
    """A signal ended the run after a checkpoint. `number` is the number of the signal."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number
        self.exit_code = INTERRUPTED if number == signal.SIGINT else REQUEUE

    def message(self) -> str:
        """Returns the text for the terminal."""
        return "stopped; the same command goes on from the last checkpoint"


INTERRUPTED = 130
"""Exit code after Ctrl-C (SIGINT)."""
READER_GONE = 141
"""128 + SIGPIPE, the exit code that shells report for a program whose reader has ended."""
REQUEUE = 75
"""EX_TEMPFAIL: exit code after SIGTERM, SIGUSR1 or SIGUSR2; start the same command again."""
