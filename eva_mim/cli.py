"""`eva-mim`: one command for stages, pipelines, and for looking at teachers and runs.

Nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from eva_mim.core.registry import PROGRAMS, Command, lookup

COMMANDS = PROGRAMS | {
    "pipeline": Command("eva_mim.commands.pipeline", "all stages of a pipeline file, in order"),
    "teacher": Command("eva_mim.commands.teacher", "look at a teacher before training with it"),
    "data": Command("eva_mim.commands.data", "index, inspect, verify or pack a data set before training on it"),
    "bench": Command("eva_mim.commands.bench", "how fast the data loader is, and where its time goes"),
    "labels": Command("eva_mim.commands.labels", "name the class list of a dataset or a checkpoint"),
    "sweep": Command("eva_mim.commands.sweep", "the same chain for several towers, numbers of samples, seeds and data"),
    "evaluate": Command("eva_mim.commands.evaluate", "measure a checkpoint again, or on ImageNet's variants"),
    "cache": Command("pretrain.cache", "compute the targets of a masked stage once, for runs without a teacher"),
    "features": Command("eva_mim.commands.features", "write features of images, for search, duplicates and clusters"),
    "replay": Command("eva_mim.commands.replay", "run the last step of a diverged run again"),
    "inspect": Command("eva_mim.commands.inspect", "look at a checkpoint without running anything in it"),
    "convert": Command("eva_mim.commands.convert", "write a checkpoint for another program, with a proof"),
}
"""Each place has `main(argv)`, which returns the exit code."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in COMMANDS:
        return _usage(arguments)
    code: int = lookup(COMMANDS, arguments[0], "command").main(arguments[1:])
    return code


def _usage(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="eva-mim",
        description="Frozen vision teachers into students by masked feature prediction, and on to CLIP and classifiers.",
        epilog="`eva-mim COMMAND --help` says more. Recipes ship with the package: configs/pipelines/demo.yaml is a start.",
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.help)
    if parser.parse_args(arguments).version:
        from eva_mim import __version__

        sys.stdout.write(f"eva-mim {__version__}\n")
        return 0
    parser.print_help()
    return 2


def entry() -> None:
    """The console script."""
    from eva_mim.run.program import leave

    leave(main())


if __name__ == "__main__":
    entry()
