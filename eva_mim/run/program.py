"""The outside of every program: arguments, settings, errors and exit codes. Light to import."""

from __future__ import annotations

import argparse
import errno
import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from eva_mim.core.distributed import LostProcess, leave_group, losses_told, world_size
from eva_mim.core.errors import UserError
from eva_mim.core.settings import override, parse, read_yaml
from eva_mim.run.recipe import Recipe

USER_ERROR = 2
INTERRUPTED = 130
DIVERGED = 3
"""The gradient stayed non-finite after every rewind; the text names the dump."""
LOST = 69
"""EX_UNAVAILABLE: another process has gone or does not answer. What it said itself tells whether to start the command again."""
GRACE = 2.0
"""Seconds in which the other ranks come to say the same, before a launcher that sees this one end ends them."""
REQUEUE = 75
"""EX_TEMPFAIL: SIGTERM, SIGUSR1 or SIGUSR2 ended the run after a checkpoint; start the same command again."""


def guard(work: Callable[[], Any]) -> int:
    """Run `work` and turn its end into an exit code: 0, 2 (the user's mistake, text only), 3 (diverged), 69 (another process is
    lost), 75 (requeue) or 130 (Ctrl-C)."""
    try:
        with losses_told():
            work()
    except LostProcess as error:
        sys.stderr.write(f"error: {error}; if it was a fault of its host, the same command goes on from the last checkpoint\n")
        return LOST
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.stderr.flush()
        return USER_ERROR
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        sys.stderr.write(f"error: {error.filename or 'a file'}: {error.strerror}; make room, then the same command goes on from "
                         "the last checkpoint\n")
        return USER_ERROR
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return INTERRUPTED
    except Exception as error:
        if type(error).__name__ == "Diverged":
            sys.stderr.write(f"diverged: {error}\n")
            return DIVERGED
        number = getattr(error, "number", None)
        if type(error).__name__ != "Interrupted" or number is None:
            raise
        sys.stderr.write("stopped; the same command goes on from the last checkpoint\n")
        return INTERRUPTED if number == signal.SIGINT else REQUEUE
    return 0


def leave(code: int) -> None:
    """End the process with `code`; after a failure without waiting for other ranks that may be stuck in a collective."""
    if not code:
        leave_group()
    gc.freeze()  # or the last collections look at a million objects of the libraries: seconds after the last line
    sys.stdout.flush()
    sys.stderr.flush()
    if code in (USER_ERROR, LOST) and world_size() > 1:
        time.sleep(GRACE)
    os._exit(code) if code and (world_size() > 1 or "RANK" in os.environ) else sys.exit(code)


def stage_parser(program: str, summary: str) -> argparse.ArgumentParser:
    """Arguments of a stage program."""
    parser = argparse.ArgumentParser(prog=f"eva-mim {program}", description=summary)
    parser.add_argument("recipe", help="YAML file, or the name of a recipe that ships with eva-mim (configs/...)")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings to change, by dotted name")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; a run already there goes on")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    return parser


def run_program(module: str, program: str, argv: Sequence[str] | None, summary: str) -> int:
    """A stage program from its command line to its exit code. `module` holds `StageRecipe` and `build`."""
    arguments = stage_parser(program, summary).parse_intermixed_args(argv)
    if arguments.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(arguments.local_rank))
    home = import_module(module)

    def work() -> None:
        tree = override(read_yaml(arguments.recipe), arguments.overrides)
        recipe: Recipe = parse(home.StageRecipe, tree, arguments.recipe)
        from eva_mim.run.stage import run_stage

        run_stage(program, recipe, arguments.out, home.build)

    return guard(work)
