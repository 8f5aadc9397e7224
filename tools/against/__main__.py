"""The training speed of this project against that of others: same machine, model, data, precision and batch, runs in turn.

    python -m tools.against clip [--model ViT-B-32]
    python -m tools.against classify --timm PATH/train.py [--model vit_small_patch16_224]
    python -m tools.against mim --original PATH/EVA-01/eva [--student b] [--no-teacher]

Each run is a process of its own. Its clocks are read after two steps of warm-up and after the measured ones, so that start-up is
left out. A step includes its wait for data and its log lines. "cpu-s" are user and system seconds of all processes of a program.
"others" are the cores that other processes used meanwhile: above some 0.15, images/s are not clean, and cpu-s the better figure.

Equal on both sides: sizes of the network, pictures (drawn, JPEG of 400 x 400 px), batch, number of loader processes, precision
(autocast over fp32 weights), AdamW's settings, clipping, laws of random crops and flips, bicubic resizing. Threads are torch's
default. Each side keeps its own loader, random numbers, kernels, and how often it writes log lines.

clip: open_clip_train reads shards in sequence. Its image tower is open_clip's own transformer, ours is timm's of the same sizes.
classify: random crops and flips only, label smoothing 0.1, mean pooling. timm's train.py has TIMM_FUSED_ATTN=0, the faster kernel
on CPUs, unless the environment says otherwise: this project chooses it by itself.
mim: EVA-01's own program, without DeepSpeed. Teacher: CLIP L/14 with random weights at 224 px. Student: 257 tokens, at most 105
masked, drop path 0.1; keys have a bias in timm's students and none in EVA-01's. EVA-01 writes a log line in each step. "cached"
reads int8 targets that `eva-mim cache` made before. With --no-teacher EVA-01 has the same random targets in each step, and
"cached" alone is compared.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from eva_mim.commands import positive
from eva_mim.core.errors import UserError
from eva_mim.core.files import write_json
from eva_mim.core.processes import cores
from tools.against.figures import ratios, table
from tools.against.jobs import classify, clip, mim
from tools.against.original import STUDENTS
from tools.against.runs import alternate


def compare(options: argparse.Namespace, words: list[str]) -> None:
    """Makes the data, runs both sides in turn and prints the table; `words` are the command line. Raises UserError."""
    with TemporaryDirectory(prefix="against-") as folder:
        job = options.job(options, Path(folder))
        runs = alternate(job, Path(folder), options.rounds, options.steps, options.batch)
    how = (f"batch {options.batch}, {options.precision}, loader processes: {options.workers}, cores: {cores()}, "
           f"rounds: {options.rounds}, steps: {options.steps}")
    sys.stdout.write(table(f"{job.title}\n{how}", runs, job.theirs.name))
    if options.to is not None:
        write_json(options.to, {
            "title": job.title, "how": how, "command": shlex.join(["python", "-m", "tools.against", *words]),
            "machine": platform.platform(),
            "versions": {name: version(name) for name in ("eva-mim", "torch", "timm", "open_clip_torch")},
            "runs": {name: [asdict(run) for run in found] for name, found in runs.items()},
            "ratios": {side.name: ratios(runs[side.name], runs[job.theirs.name]) for side in job.ours},
        })


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    whole = argparse.ArgumentParser(
        prog="python -m tools.against", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = whole.add_subparsers(required=True, metavar="clip|classify|mim")
    for job, batch, more in ((clip, 64, _clip_options), (classify, 32, _classify_options), (mim, 32, _mim_options)):
        part = parts.add_parser(job.__name__)
        part.set_defaults(job=job)
        more(part)
        part.add_argument("--batch", type=positive, default=batch, help=f"images of a step (default {batch})")
        part.add_argument("--precision", choices=["bf16", "fp32"], default="bf16", help="default bf16")
        part.add_argument("--workers", type=int, choices=range(65), default=1, metavar="N", help="loader processes (default 1)")
        part.add_argument("--rounds", type=positive, default=3, help="runs of each side (default 3)")
        part.add_argument("--steps", type=positive, default=5, help="measured steps of a run (default 5)")
        part.add_argument("--to", type=Path, metavar="FILE", help="write all figures as JSON")
    return whole


def _clip_options(part: argparse.ArgumentParser) -> None:
    part.add_argument("--model", default="ViT-B-32", help="of open_clip (default ViT-B-32)")


def _classify_options(part: argparse.ArgumentParser) -> None:
    part.add_argument("--timm", type=Path, required=True, metavar="PATH", help="train.py of huggingface/pytorch-image-models")
    part.add_argument("--model", default="vit_small_patch16_224", help="of timm (default vit_small_patch16_224)")


def _mim_options(part: argparse.ArgumentParser) -> None:
    part.add_argument("--original", type=Path, required=True, metavar="PATH", help="folder EVA-01/eva of baaivision/EVA")
    part.add_argument("--student", choices=STUDENTS, default="ti", help="192 or 768 wide, 12 blocks (default ti)")
    part.add_argument("--no-teacher", action="store_true", help="measure the student alone, on given targets")


def main(argv: list[str] | None = None) -> int:
    """Run a job; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    options = parser().parse_args(words)
    try:
        compare(options, words)
    except UserError as error:
        sys.stderr.write(f"{error.message()}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
