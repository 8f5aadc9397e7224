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
    stats = commands.add_parser(
        "stats", help="mean and std of each channel, as settings; a window for images of more than 8 bits",
        description="Measure mean and std of each channel on training images and print them as settings; for images of more than "
        "8 bits also propose data.window.",
    )
    stats.add_argument("what", metavar="RECIPE|FOLDER", help="as for index")
    stats.add_argument("overrides", nargs="*", metavar="data.a=b", help="such as data.channels=4")
    stats.add_argument("--images", type=int, default=5000, metavar="N", help="drawn as training draws them (default 5000)")
    stats.add_argument("--processes", type=int, metavar="N", help="default one a core")
    options = parser.parse_args(argv)

    def work() -> None:
        if options.command == "stats":
            from eva_mim.data_commands.stats import stats as measure

            measure(options.what, options.overrides, images=options.images, processes=options.processes)
            return
        from eva_mim.data_commands.index import describe

        describe(options.what, options.overrides)

    return guard(work)
