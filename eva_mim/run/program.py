"""The frame of every program: arguments, settings, errors and exit codes. It imports no torch."""

from __future__ import annotations

import argparse
import errno
import gc
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eva_mim.core.distributed import detect_lost_processes, leave_group, world_size
from eva_mim.core.errors import INTERRUPTED, READER_GONE, LostProcess, ProgramError, UserError
from eva_mim.core.log import say
from eva_mim.core.recipe_files import read_yaml
from eva_mim.core.registry import PROGRAMS, sentence
from eva_mim.core.resolve import resolve
from eva_mim.run.recipe import Recipe

if TYPE_CHECKING:
    import torch

    from eva_mim.run.stage import Built, Networks

GRACE = 2.0
"""Seconds for the other ranks to print their own errors: the launcher ends them as soon as this one has ended."""


def guard(work: Callable[[], Any]) -> int:
    """Runs `work`; returns the exit code: 0, 2 (mistake of the user, printed without traceback), 3 (diverged), 69 (another
    process is lost), 75 (requeue), 130 (Ctrl-C) or 141 (nobody reads the output any more, as after `| head`).

    torch's tensors on the CPU lie on huge pages from here on, unless the environment decides: see docs/performance.md."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch's own switch, read at its first tensor
    try:
        with detect_lost_processes():
            work()
        sys.stdout.flush()
    except ProgramError as error:
        sys.stderr.write(f"{error.message()}\n")
        sys.stderr.flush()
        return error.exit_code
    except BrokenPipeError:
        if not _reader_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains once more when it ends
        return READER_GONE
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


def _reader_gone() -> bool:
    """Returns whether nobody reads the standard output any more."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return True
    return False


def leave(code: int) -> None:
    """Ends the process with `code`; after a failure it does not wait for other ranks, which may be stuck in a collective."""
    if not code:
        leave_group()
    gc.freeze()  # otherwise the last collections scan a million objects of the libraries, for seconds
    sys.stdout.flush()
    sys.stderr.flush()
    if code in (UserError.exit_code, LostProcess.exit_code) and world_size() > 1:
        time.sleep(GRACE)
    if not code or not (world_size() > 1 or "RANK" in os.environ):
        sys.exit(code)
    for child in multiprocessing.active_children():  # a loader process that hangs would keep the sockets to the other ranks open
        child.kill()
    os._exit(code)


def stage_parser(program: str) -> argparse.ArgumentParser:
    """Returns the argument parser of a stage program."""
    parser = argparse.ArgumentParser(prog=f"eva-mim {program}", description=sentence(PROGRAMS[program].help))
    parser.add_argument("recipe", help="YAML file, or the name of a recipe that ships with eva-mim (configs/...)")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings to change, by dotted name")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; a run already there goes on")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    return parser


@dataclass(frozen=True)
class Stage:
    """A kind of stage, with what its command, pipelines and the commands on its runs need."""

    name: str
    """Name of its command, also in pipelines and records."""
    recipe: type[Recipe]
    networks: Callable[..., Networks]
    """(recipe, number of classes of its data: int | None, weights: bool) -> student and teachers. With `weights` false no weights
    are read from files, so that `on_meta` returns sizes of any recipe at no cost."""
    build: Callable[[Any, torch.device], Built]
    """(recipe, device) -> networks, data and evaluator."""

    def on_meta(self, recipe: Recipe, classes: int | None = None) -> Networks:
        """Returns the networks of a recipe on the meta device (no memory for weights): names, shapes, grids and widths.
        `classes`: number of classes of the data, for a head."""
        from eva_mim.trunks.meta import meta_device

        with meta_device():
            return self.networks(recipe, classes, weights=False)

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Runs the stage from its command line; returns the exit code."""
        arguments = stage_parser(self.name).parse_intermixed_args(argv)
        if arguments.local_rank is not None:
            os.environ.setdefault("LOCAL_RANK", str(arguments.local_rank))

        def work() -> None:
            recipe: Recipe = resolve(self.recipe, read_yaml(arguments.recipe), arguments.overrides, arguments.recipe)
            state = None
            if world_size() == 1:  # several ranks do this in `run_stage`, where they have a process group
                from eva_mim.run.state import state_of

                state = state_of(self.name, recipe, arguments.out)
                if state.finished:  # answered before torch is loaded
                    say(state.nothing_to_do(arguments.out))
                    return
            say(f"{self.name} {arguments.recipe} -> {arguments.out}")  # before torch is loaded, which takes seconds
            from eva_mim.run.stage import run_stage

            run_stage(self, recipe, arguments.out, state)

        return guard(work)
