"""`eva-mim data COMMAND`: looks at a data set and prepares it, before anything is trained. Light to import."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from eva_mim.run.program import guard

COMMANDS = {
    "index": "make the index that every run opens, where there is none or a stale one, and say what is in the data",
    "inspect": "counts, sizes, classes, captions, and a contact sheet",
    "stats": "mean and std of each channel, as settings; a window for images of more than 8 bits",
    "verify": "decode every image and list the broken ones for data.quarantine; an interrupted check goes on",
    "pack": "write tar shards; an interrupted command goes on",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the commands; returns its exit code."""
    parser = argparse.ArgumentParser(prog="eva-mim data", description="Look at a data set and prepare it.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    command = parser.parse_known_args(argv)[0].command
    # A parser of its own: those of sub-commands cannot have settings before and after options.
    options = _parser(command).parse_intermixed_args(list(sys.argv[1:] if argv is None else argv)[1:])
    return guard(lambda: _work(command, options))


def _parser(command: str) -> argparse.ArgumentParser:
    summary = COMMANDS[command]
    parser = argparse.ArgumentParser(prog=f"eva-mim data {command}", description=f"{summary[0].upper()}{summary[1:]}.")
    parser.add_argument("what", metavar="RECIPE|FOLDER", help="a recipe, or a folder of images, class folders or tar shards")
    parser.add_argument("overrides", nargs="*", metavar="data.a=b", help="settings to change, by dotted name")
    if command != "index":
        parser.add_argument("--processes", type=_positive, metavar="N", help="default one a core")
    if command == "inspect":
        parser.add_argument("--images", type=_positive, default=2000, help="looked at, spread over each split (default 2000)")
        parser.add_argument("--out", type=Path, metavar="FOLDER", help="write a contact sheet of each split there")
    elif command == "stats":
        parser.add_argument("--images", type=_positive, default=5000, help="drawn as training draws them (default 5000)")
    elif command == "verify":
        parser.add_argument("--out", type=Path, default=Path("quarantine.json"), help="the list (default quarantine.json)")
    elif command == "pack":
        parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="of the shards: empty, or begun before")
        parser.add_argument("--per-shard", type=_positive, default=10_000, metavar="N", help="records in a shard (default 10000)")
        parser.add_argument("--seed", type=int, default=0, help="of the order of records (default 0)")
        parser.add_argument("--keep-order", action="store_true", help="records stay in their order, which may be by class")
    return parser


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def _work(command: str, options: argparse.Namespace) -> None:
    what, overrides = options.what, options.overrides
    if command == "index":
        from eva_mim.commands.data.index import describe

        describe(what, overrides)
    elif command == "inspect":
        from eva_mim.commands.data.inspect import inspect

        inspect(what, overrides, images=options.images, out=options.out, processes=options.processes)
    elif command == "stats":
        from eva_mim.commands.data.stats import stats

        stats(what, overrides, images=options.images, processes=options.processes)
    elif command == "verify":
        from eva_mim.commands.data.verify import verify

        verify(what, overrides, options.out, options.processes)
    else:
        from eva_mim.commands.data.pack import pack

        seed = None if options.keep_order else options.seed
        pack(what, overrides, options.out, per_shard=options.per_shard, seed=seed, processes=options.processes)
