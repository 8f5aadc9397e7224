"""`eva-mim bench WHAT`: measures the speed of a part of training on this machine. Light to import."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from eva_mim.commands import positive
from eva_mim.core.errors import UserError
from eva_mim.core.registry import sentence
from eva_mim.run.program import guard


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a benchmark; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] and words[0] in PARTS:
        part = PARTS[words[0]]
        parser = argparse.ArgumentParser(prog=f"eva-mim bench {words[0]}", description=sentence(part.help))
        part.add_options(parser)
        options = parser.parse_intermixed_args(words[1:])
        return guard(lambda: part.work(options))
    parser = argparse.ArgumentParser(prog="eva-mim bench", description="How fast a part of training is on this machine.",
                                     epilog="; ".join(f"{name}: {part.help}" for name, part in PARTS.items()))
    parser.add_argument("part", choices=PARTS)
    parser.parse_args(words)
    raise AssertionError("an unknown part is refused")


def _data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", metavar="RECIPE|FOLDER", help="a recipe, or a folder of images, class folders or tar shards")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings of data, view and mask to change")
    parser.add_argument("--size", type=int, action="append", help="side of a view: student's, then teacher's (default 224)")
    parser.add_argument("--patch", type=int, default=16, help="side of a patch, for masks (default 16)")
    parser.add_argument("--workers", type=int, action="append", help="loader processes; several times for several (default 1)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement (default 10)")


def _step_options(parser: argparse.ArgumentParser) -> None:
    _recipe_options(parser)
    parser.add_argument("--steps", type=positive, default=5, metavar="N", help="measured steps (default 5)")


def _recipe_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", metavar="RECIPE", help="YAML file of a stage")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings to change")
    parser.add_argument("--program", metavar="NAME", help="the stage's program; default the name of the recipe's folder")
    parser.add_argument("--to", type=Path, metavar="FILE", help="write the figures as JSON")


def _resume_options(parser: argparse.ArgumentParser) -> None:
    _recipe_options(parser)
    parser.add_argument("--disk", type=Path, metavar="FOLDER", help="where the checkpoints are written, which are removed at the "
                        "end; default the system's temporary folder")


def _compare_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs=2, metavar="FILE")


def _data(options: argparse.Namespace) -> None:
    from eva_mim.commands.data.speed import measure

    measure(options.what, options.overrides, options.size or [224], options.patch, options.workers or [1], options.seconds)


def _step(options: argparse.Namespace) -> None:
    _check_to(options)
    from eva_mim.commands.step_speed import measure_step

    measure_step(options.program, options.what, options.overrides, options.steps, options.to)


def _resume(options: argparse.Namespace) -> None:
    _check_to(options)
    from eva_mim.commands.resume_speed import measure_resume

    measure_resume(options.program, options.what, options.overrides, options.disk, options.to)


def _check_to(options: argparse.Namespace) -> None:
    for option, path in (("--to", options.to and options.to.absolute().parent), ("--disk", getattr(options, "disk", None))):
        if path is not None and not path.is_dir():
            raise UserError(f"{option}: {path} is not a folder")


def _compare(options: argparse.Namespace) -> None:
    from eva_mim.commands.step_speed import StepSpeed, compare

    found = []
    for file in options.files:
        try:
            found.append(StepSpeed.model_validate_json(Path(file).read_text()))
        except (OSError, ValueError) as error:
            raise UserError(f"{file} is no file of `eva-mim bench step --to`: {str(error).splitlines()[0]}") from None
    sys.stdout.write(compare(*found))


class Part(NamedTuple):
    """A benchmark."""

    help: str
    add_options: Callable[[argparse.ArgumentParser], None]
    work: Callable[[argparse.Namespace], None]


PARTS = {
    "data": Part("images a second of a loader worker, and where its time goes; no network is built", _data_options, _data),
    "step": Part("where the time of a training step goes, and which setting would change it", _step_options, _step),
    "resume": Part("what a checkpoint costs a run, and how long it takes to go on from one", _resume_options, _resume),
    "compare": Part("two files of `bench step --to` side by side", _compare_options, _compare),
}
