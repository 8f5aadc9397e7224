"""`eva-mim pipeline`: runs all stages of a file in order, or prints what would run, or prints the stages as plain commands. Light
to import."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from eva_mim.run.program import guard


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="eva-mim pipeline", description="All stages of a pipeline file, in order.")
    parser.add_argument("pipeline", help="YAML file, or the name of one that ships with eva-mim (configs/pipelines/...)")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="for all stages; STAGE.a.b=c for one")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pipeline; each stage gets a folder in it")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dry-run", action="store_true", help="print what would run and why")
    mode.add_argument("--print-shell", action="store_true", help="print the stages as plain commands")
    options = parser.parse_intermixed_args(argv)
    from eva_mim.pipeline import run as pipeline

    call = options.pipeline, options.overrides, options.out
    if options.dry_run:
        return guard(lambda: sys.stdout.write(pipeline.describe(*call) + "\n"))
    if options.print_shell:
        return guard(lambda: sys.stdout.write(pipeline.as_shell(*call) + "\n"))
    return guard(lambda: pipeline.run_pipeline(*call))
