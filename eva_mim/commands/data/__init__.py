"""`eva-mim data COMMAND`: commands that inspect a data set and prepare it for training. Light to import."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from eva_mim.commands import positive
from eva_mim.core.registry import Command, lookup, sentence
from eva_mim.run.program import guard

COMMANDS = {
    "index": Command("eva_mim.commands.data.index",
                     "make the index that every run opens, where there is none or a stale one, and say what is in the data"),
    "inspect": Command("eva_mim.commands.data.inspect", "counts, sizes, classes, captions, and a contact sheet"),
    "stats": Command("eva_mim.commands.data.stats",
                     "mean and std of each channel, as settings; a window for images of more than 8 bits"),
    "verify": Command("eva_mim.commands.data.verify",
                      "decode every image and list the broken ones for data.quarantine; an interrupted check goes on"),
    "pack": Command("eva_mim.commands.data.pack", "write tar shards; an interrupted command goes on"),
    "merge": Command("eva_mim.commands.data.merge", "join data sets by their classes' names, without what any of them holds out"),
}
"""Commands by name. Each module has `add_options(parser)` and `run(options)`; the options have `what` and `overrides` besides the
command's own."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one of the commands; returns the exit code."""
    parser = argparse.ArgumentParser(prog="eva-mim data", description="Look at a data set and prepare it.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.help, add_help=False)
    chosen = parser.parse_known_args(argv)[0].command
    home, summary = lookup(COMMANDS, chosen, "command"), COMMANDS[chosen].help
    # A separate parser: those of sub-commands do not accept settings both before and after options.
    parser = argparse.ArgumentParser(prog=f"eva-mim data {chosen}", description=sentence(summary))
    parser.add_argument("what", metavar="RECIPE|FOLDER", help="a recipe, or a folder of images, class folders or tar shards")
    parser.add_argument("overrides", nargs="*", metavar="data.a=b", help="settings to change, by dotted name")
    home.add_options(parser)
    options = parser.parse_intermixed_args(list(sys.argv[1:] if argv is None else argv)[1:])
    return guard(lambda: home.run(options))


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Adds the option `--processes`."""
    parser.add_argument("--processes", type=positive, metavar="N", help="default one a core")
