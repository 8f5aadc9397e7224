"""The outside of every program: arguments, settings, errors and exit codes. Light to import."""

from __future__ import annotations

import argparse
import errno
import gc
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eva_mim.core.distributed import detect_lost_processes, leave_group, world_size
from eva_mim.core.errors import INTERRUPTED, LostProcess, ProgramError, UserError
from eva_mim.core.log import say
from eva_mim.core.resolve import resolve
from eva_mim.core.settings import read_yaml
from eva_mim.run.recipe import Recipe

if TYPE_CHECKING:
    import torch

    from eva_mim.run.stage import Built, Networks

GRACE = 2.0
"""Seconds in which the other ranks come to say the same, before a launcher that sees this one end ends them."""


def guard(work: Callable[[], Any]) -> int:
    """Run `work` and turn its end into an exit code: 0, 2 (the user's mistake, text only), 3 (diverged), 69 (another process is
    lost), 75 (requeue) or 130 (Ctrl-C)."""
    try:
        with detect_lost_processes():
            work()
    except ProgramError as error:
        sys.stderr.write(f"{error.message()}\n")
        sys.stderr.flush()
        return error.exit_code
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        sys.stderr.write(f"error: {error.filename or 'a file'}: {error.strerror}; make room, then the same command goes on from "
                         "the last checkpoint\n")
        return UserError.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return INTERRUPTED
    return 0


def leave(code: int) -> None:
    """End the process with `code`; after a failure without waiting for other ranks that may be stuck in a collective."""
    if not code:
        leave_group()
    gc.freeze()  # or the last collections look at a million objects of the libraries: seconds after the last line
    sys.stdout.flush()
    sys.stderr.flush()
    if code in (UserError.exit_code, LostProcess.exit_code) and world_size() > 1:
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


@dataclass(frozen=True)
class Stage:
    """A kind of stage: what its command, a pipeline and the commands that look at its runs need of it."""

    name: str
    """Of its command, and in pipelines and records."""
    help: str
    """A sentence."""
    recipe: type[Recipe]
    networks: Callable[..., Networks]
    """(recipe, classes of its data: int | None, weights: bool) -> its student and teachers. With `weights` false none is read
    from a file, so that `on_meta` knows sizes of any recipe at no cost."""
    build: Callable[[Any, torch.device], Built]
    """Makes networks, data and evaluator of a recipe."""

    def on_meta(self, recipe: Recipe, classes: int | None = None) -> Networks:
        """The networks of a recipe without memory for weights: names, shapes, grids and widths. `classes` of a head: as many as
        the data has."""
        import torch

        with torch.device("meta"):
            return self.networks(recipe, classes, weights=False)

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Run the stage from its command line; returns the exit code."""
        arguments = stage_parser(self.name, self.help).parse_intermixed_args(argv)
        if arguments.local_rank is not None:
            os.environ.setdefault("LOCAL_RANK", str(arguments.local_rank))

        def work() -> None:
            recipe: Recipe = resolve(self.recipe, read_yaml(arguments.recipe), arguments.overrides, arguments.recipe)
            state = None
            if world_size() == 1:  # several ranks look together, once they are a group
                from eva_mim.run.state import state_of

                state = state_of(self.name, recipe, arguments.out)
                if state.finished:  # answered before torch is loaded
                    say(f"{arguments.out}: finished before, nothing to do ({state.figures})")
                    return
            from eva_mim.run.stage import run_stage

            run_stage(self, recipe, arguments.out, state)

        return guard(work)
