"""Errors that end a program."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake of the user's: shown as its text alone, without traceback, with exit code 2."""
