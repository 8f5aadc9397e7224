"""`eva-mim bench WHAT`: measures the speed of a part of training on this machine. Light to import."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from eva_mim.run.program import guard


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(prog="eva-mim bench", description="How fast a part of training is on this machine.")
    parser.add_argument("part", choices=["data"], help="data: images a second of a loader worker, and where its time goes; no "
                        "network is built")
    parser.add_argument("what", metavar="RECIPE|FOLDER", help="a recipe, or a folder of images, class folders or tar shards")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings of data, view and mask to change")
    parser.add_argument("--size", type=int, action="append", help="side of a view: student's, then teacher's (default 224)")
    parser.add_argument("--patch", type=int, default=16, help="side of a patch, for masks (default 16)")
    parser.add_argument("--workers", type=int, action="append", help="loader processes; several times for several (default 1)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement (default 10)")
    options = parser.parse_intermixed_args(argv)

    def work() -> None:
        from eva_mim.commands.data.speed import measure

        measure(options.what, options.overrides, options.size or [224], options.patch, options.workers or [1],
                options.seconds)

    return guard(work)
