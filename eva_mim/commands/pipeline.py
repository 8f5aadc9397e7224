"""`eva-mim pipeline`: runs all stages of a file in order, or prints what would run, or prints the stages as plain commands. Light
to import."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from eva_mim.commands import positive
from eva_mim.run.program import guard


def pipeline_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command's line."""
    parser = argparse.ArgumentParser(prog="eva-mim pipeline", description="All stages of a pipeline file, in order.")
    parser.add_argument("pipeline", help="YAML file, or the name of one that ships with eva-mim (configs/pipelines/...)")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="for all stages; STAGE.a.b=c for one")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pipeline; each stage gets a folder in it")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dry-run", action="store_true", help="print what would run and why")
    mode.add_argument("--print-shell", action="store_true", help="print the stages as plain commands")
    parser.add_argument("--nodes", type=positive, metavar="N", help="for --dry-run and --print-shell: nodes, default 1")
    parser.add_argument("--gpus-per-node", type=positive, metavar="G", help="likewise: GPUs of a node, default 1")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = pipeline_parser()
    options = parser.parse_intermixed_args(argv)
    call, sizes = (options.pipeline, options.overrides, options.out), (options.nodes, options.gpus_per_node)
    if not (options.dry_run or options.print_shell):
        if any(sizes):
            parser.error("--nodes and --gpus-per-node only say how --print-shell starts the stages, and --dry-run counts")
        from eva_mim.pipeline.run import run_pipeline

        return guard(lambda: run_pipeline(*call))
    from eva_mim.pipeline.preview import Cluster, as_shell, as_table

    cluster = Cluster(*(size or 1 for size in sizes)) if any(sizes) else None
    show = as_table if options.dry_run else as_shell
    return guard(lambda: sys.stdout.write(show(*call, cluster) + "\n"))
