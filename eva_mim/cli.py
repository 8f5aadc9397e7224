"""`eva-mim`: one command for stages, pipelines, and for looking at teachers and runs.

Nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

SUMMARIES = {
    "mim": "masked feature pretraining with a frozen teacher",
    "clip": "contrastive image-text training",
    "classify": "fine-tuning of a classifier (the broad and the target stage)",
    "probe": "linear probe on frozen features",
    "pipeline": "all stages of a pipeline file, in order",
    "teacher": "look at a teacher before training with it",
    "data": "index, inspect, verify or pack a data set before training on it",
    "bench": "how fast the data loader is, and where its time goes",
    "labels": "name the class list of a dataset or a checkpoint",
    "evaluate": "measure a checkpoint again, or on ImageNet's variants",
    "replay": "run the last step of a diverged run again",
    "inspect": "look at a checkpoint without running anything in it",
    "convert": "write a checkpoint for another program, with a proof",
}
OTHERS = {
    "teacher": "eva_mim.commands.teacher", "data": "eva_mim.commands.data", "bench": "eva_mim.commands.bench",
    "labels": "eva_mim.commands.labels",
    "evaluate": "eva_mim.commands.evaluate", "replay": "eva_mim.commands.replay", "inspect": "eva_mim.commands.inspect",
    "convert": "eva_mim.commands.convert",
}
"""Commands that are no stages: modules with `main(argv)`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in SUMMARIES:
        return _usage(arguments)
    command, rest = arguments[0], arguments[1:]
    if command == "pipeline":
        return _pipeline(rest)
    from eva_mim.core.registry import PROGRAMS, lookup

    code: int = lookup(PROGRAMS | OTHERS, command, "command").main(rest)
    return code


def _usage(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="eva-mim",
        description="Frozen vision teachers into students by masked feature prediction, and on to CLIP and classifiers.",
        epilog="`eva-mim COMMAND --help` says more. Recipes ship with the package: configs/pipelines/demo.yaml is a start.",
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, summary in SUMMARIES.items():
        commands.add_parser(name, help=summary)
    if parser.parse_args(arguments).version:
        from eva_mim import __version__

        sys.stdout.write(f"eva-mim {__version__}\n")
        return 0
    parser.print_help()
    return 2


def _pipeline(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="eva-mim pipeline", description=SUMMARIES["pipeline"])
    parser.add_argument("pipeline", help="YAML file, or the name of one that ships with eva-mim (configs/pipelines/...)")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="for all stages; STAGE.a.b=c for one")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pipeline; each stage gets a folder in it")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dry-run", action="store_true", help="print what would run and why")
    mode.add_argument("--print-shell", action="store_true", help="print the stages as plain commands")
    options = parser.parse_intermixed_args(arguments)
    from eva_mim.pipeline import run as pipeline
    from eva_mim.run.program import guard

    call = options.pipeline, options.overrides, options.out
    if options.dry_run:
        return guard(lambda: sys.stdout.write(pipeline.describe(*call) + "\n"))
    if options.print_shell:
        return guard(lambda: sys.stdout.write(pipeline.as_shell(*call) + "\n"))
    return guard(lambda: pipeline.run_pipeline(*call))


def entry() -> None:
    """The console script."""
    from eva_mim.run.program import leave

    leave(main())


if __name__ == "__main__":
    entry()
