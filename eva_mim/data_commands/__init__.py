"""`eva-mim data COMMAND`: looks at a data set and prepares it, before anything is trained. Light to import."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from eva_mim.program import guard


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the commands; returns its exit code."""
    parser = argparse.ArgumentParser(prog="eva-mim data", description="Look at a data set and prepare it.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    index = commands.add_parser(
        "index", help="make the index that every run opens, and say what is in the data",
        description="Make the index that every run opens, where there is none or a stale one, and say what is in the data.",
    )
    index.add_argument("what", metavar="RECIPE|FOLDER", help="a recipe, or a folder with images, class folders or tar shards")
    index.add_argument("overrides", nargs="*", metavar="data.a=b", help="settings to change, by dotted name")
    options = parser.parse_args(argv)

    def work() -> None:
        from eva_mim.data_commands.index import describe

        describe(options.what, options.overrides)

    return guard(work)
