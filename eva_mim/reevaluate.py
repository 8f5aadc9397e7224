"""`eva-mim evaluate OUT`: measure a run's newest checkpoint again and compare with what the run recorded."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

CLOSE = 1e-6
"""Relative difference that other threads or other kernels may make."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 for a mistake."""
    parser = argparse.ArgumentParser(
        prog="eva-mim evaluate",
        description="Measure the newest checkpoint of a run again. Start it with as many processes as the run (torchrun ... "
        "-m eva_mim.cli evaluate OUT).",
    )
    parser.add_argument("out", type=Path, help="folder of the run")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings to change, such as data.root=/elsewhere")
    arguments = parser.parse_intermixed_args(argv)
    from eva_mim.program import guard

    def work() -> None:
        from eva_mim.distributed import is_main
        from eva_mim.stage import evaluate_stage

        now, before = evaluate_stage(arguments.out, arguments.overrides)
        if is_main():
            sys.stdout.write(table(now, before))

    return guard(work)


def table(now: dict[str, float], before: dict[str, float]) -> str:
    """One line a figure: now, on record, and whether they agree."""
    width = max(map(len, now))
    lines = [f"{'figure':<{width}} {'now':>12} {'on record':>12}"]
    for name, value in now.items():
        old = before.get(name)
        same = old is not None and abs(value - old) <= CLOSE * max(abs(value), abs(old))
        known = f"{old:>12.6g}" if old is not None else f"{'-':>12}"
        verdict = "" if old is None else "equal" if value == old else "close" if same else "differs"
        lines.append(f"{name:<{width}} {value:>12.6g} {known}  {verdict}".rstrip())
    return "\n".join(lines) + "\n"
