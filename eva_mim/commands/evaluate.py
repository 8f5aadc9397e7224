"""`eva-mim evaluate`: measures a run's newest checkpoint again, or a finished classifier on ImageNet and its variants."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eva_mim.commands import positive
from eva_mim.commands.open_vocabulary import segment
from eva_mim.commands.resolutions import sweep
from eva_mim.commands.suite import suite
from eva_mim.commands.zero_shot_videos import zero_shot_videos
from eva_mim.core.errors import UserError
from eva_mim.core.log import say
from eva_mim.core.settings import few

CLOSE = 1e-6
"""Relative difference of two figures that count as close; threads and kernels may differ."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code, 0 or 2 for a user's mistake."""
    parser = _parser()
    options = parser.parse_intermixed_args(argv)
    if not (options.on or options.segment or options.video) and any(
            (options.classes, options.csv, options.precision, options.batch, options.templates)):
        parser.error("--classes, --templates, --csv, --precision and --batch go with --on; a run's settings are given as a.b=c")
    if options.on and options.resolution_sweep:
        parser.error("--resolution-sweep is for a run with its own data; leave --on out")
    if not options.resolution_sweep and any(value is not None for value in (options.jump, options.images)):
        parser.error("--jump and --images go with --resolution-sweep")
    if options.to is not None and not (options.resolution_sweep or options.suite or options.segment):
        parser.error("--to goes with --resolution-sweep, --suite or --segment")
    if options.segment and (options.on or options.suite or options.resolution_sweep or options.csv or options.overrides):
        parser.error("--segment has its own data; leave --on, --suite, --resolution-sweep, --csv and a.b=c out")
    if not options.segment and (options.whole or options.ignore is not None):
        parser.error("--whole and --ignore go with --segment")
    if options.video and (options.on or options.suite or options.segment or options.resolution_sweep or options.csv):
        parser.error("--video has its own data; leave --on, --suite, --segment, --resolution-sweep and --csv out")
    if options.frames is not None and not options.video:
        parser.error("--frames goes with --video")
    if options.suite and (len(options.on or ()) != 1 or "=" in options.on[0]):
        parser.error("--suite needs the folder of all its sets, once: --data DIR")
    if options.suite and any((options.classes, options.csv, options.templates, options.overrides)):
        parser.error("--suite takes classes and templates from beside the images; leave --classes, --templates, --csv and a.b=c "
                     "out")
    if options.probe and not options.suite:
        parser.error("--probe goes with --suite")
    from eva_mim.run.program import guard

    code = [0]

    def work() -> None:
        if options.suite:
            suite(options)
        elif options.segment:
            segment(options)
        elif options.video:
            zero_shot_videos(options)
        elif options.on:
            on_sets(options)
        elif options.resolution_sweep:
            code[0] = sweep(options)
        else:
            again(options.checkpoint, options.overrides)

    return guard(work) or code[0]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="eva-mim evaluate",
        description="Without --on: measure the newest checkpoint of a run again, and compare with its record; start it with as "
        "many processes as the run (torchrun ... -m eva_mim.cli evaluate OUT). With --on: accuracy of a finished classifier, or "
        "zero-shot accuracy of a CLIP model, on other images, on any number of processes. With --suite: a CLIP model on many "
        "test sets, each with its own metric.",
    )
    parser.add_argument("checkpoint", type=Path, help="folder of a run; with --on of a finished stage, its ema, or of what "
                        "eva-mim convert --to hf wrote")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="without --on: settings, such as data.root=/elsewhere")
    parser.add_argument("--on", "--data", action="append", metavar="[SET=]FOLDER", help="SET: val (a folder a class; or no "
                        "SET=), real, v2, a, r, sketch, objectnet, objectnet-first; may be given several times")
    parser.add_argument("--classes", metavar="LAYOUT|FILE", help="class list of a head that does not name its "
                        "classes; names for a CLIP model's prompts (default: the class folders of val, or ImageNet's 1,000)")
    parser.add_argument("--templates", metavar="openai|simple|FILE", help="prompts of a CLIP model; default openai, 80 of them")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write figures of each class")
    parser.add_argument("--suite", metavar="NAME|FILE", help="of a CLIP model: figures on a suite of test sets, datacomp38 or a "
                        "file such as configs/suites/datacomp38.yaml; --data is the folder of their wds_*_test folders")
    parser.add_argument("--probe", action="store_true", help="with --suite: also a linear probe on sets with training images")
    parser.add_argument("--segment", metavar="DIR", help="of a CLIP model: mIoU of patches by their nearest class text, on "
                        "DIR/images and DIR/annotations (or masks), with DIR/classes.txt")
    parser.add_argument("--whole", action="store_true", help="with --segment: the whole image at once, squashed, not in windows")
    parser.add_argument("--ignore", type=int, metavar="N", help="with --segment: value of pixels without a class (default 255)")
    parser.add_argument("--video", metavar="DIR", help="of a CLIP model: zero-shot accuracy on videos in class folders, by the "
                        "mean of their frames; a.b=c are settings of the data, such as data.video.frames=true")
    parser.add_argument("--frames", type=positive, metavar="N", help="with --video: frames of a video (default 8)")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], help="default: fp32, that of the figures on record")
    parser.add_argument("--batch", type=int, metavar="N", help="images in one forward pass; default: as in the run")
    parser.add_argument("--resolution-sweep", metavar="A..B[:STEP]", help="of a finished masked stage: figures of each teacher's "
                        "head at image sizes from A to B pixels; exit code 1 if a cosine jumps from one size to the next")
    parser.add_argument("--jump", type=float, metavar="X", help="largest change of a cosine that is no jump "
                        "(default 0.15)")
    parser.add_argument("--images", type=int, metavar="N", help="images of a sweep (default 500)")
    parser.add_argument("--to", type=Path, metavar="FILE", help="picture of a sweep, default OUT/resolutions.png; "
                        "figures of a suite, default CHECKPOINT/SUITE.json, with a Markdown table beside it; or a sheet of "
                        "predictions, default CHECKPOINT/segments.png")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="loader processes of each rank")
    return parser


def again(out: Path, overrides: Sequence[str]) -> None:
    """Measures a run's newest checkpoint with its own data, and prints the figures beside the recorded ones. Raises UserError."""
    from eva_mim.core.distributed import is_main
    from eva_mim.run.stage import evaluate_stage

    now, before = evaluate_stage(out, overrides)
    if is_main():
        sys.stdout.write(table(now, before))


def on_sets(options: argparse.Namespace) -> None:
    """Measures a finished classifier on the test sets of `--on`, after all their folders have been checked, and prints the
    accuracies. Raises UserError."""
    from eva_mim.core.distributed import is_main, setup
    from eva_mim.core.files import write_text
    from eva_mim.evaluate import accuracy
    from eva_mim.evaluate.imagenet import columns, open_variant

    if options.overrides:
        raise UserError(f"{options.overrides[0]}: settings are those of a run with its own data; leave --on out")
    device = setup()
    sets = [given.split("=", 1) if "=" in given else ("val", given) for given in options.on]
    options.classes = options.classes or own_classes(options.checkpoint, sets)
    model = opened(options, device)
    variants = []
    for name, folder in sets:
        variants.append(open_variant(name, Path(folder), model.classes))
        columns(variants[-1], model.classes)
    found = [
        accuracy.measure(model, variant, device, precision=options.precision or "fp32",
                         batch=options.batch or model.batch, workers=options.workers)
        for variant in variants
    ]
    if is_main():
        sys.stdout.write(accuracy.as_table(found))
        if options.csv:
            write_text(options.csv, accuracy.as_csv(found))


def own_classes(checkpoint: Path, sets: Sequence[Sequence[str]]) -> str | None:
    """Returns the folder whose class folders name the classes of a CLIP model's prompts: the first test set "val" that is not
    in one of ImageNet's layouts; None if there is none, and for a classifier, which has its own."""
    from eva_mim.data.class_lists import layout_of
    from eva_mim.data.sources.folder import class_folders
    from eva_mim.weights.files.sidecar import describe

    for name, folder in sets if describe(checkpoint).open_clip else ():
        if name == "val" and Path(folder).is_dir() and (found := class_folders(Path(folder))) and layout_of(found) is None:
            say(f"  the classes are the {len(found)} folders of {folder}: {few(found, 3)}; name others with --classes")
            return folder
    return None


def opened(options: argparse.Namespace, device: Any) -> Any:
    """Returns the classifier in a folder: a timm model, or a CLIP model with its prompts as class weights. Raises UserError for
    anything else."""
    from eva_mim.evaluate.accuracy import FolderClassifier
    from eva_mim.evaluate.zeroshot import ZeroShot
    from eva_mim.weights.files.sidecar import describe

    if describe(options.checkpoint).open_clip:
        return ZeroShot(options.checkpoint, classes=options.classes, templates=options.templates or "openai",
                        precision=options.precision or "fp32", device=device)
    if options.templates:
        raise UserError(f"--templates {options.templates}: {options.checkpoint} is no CLIP model (open_clip_config.json)")
    return FolderClassifier(options.checkpoint, options.classes)


def table(now: dict[str, float], before: dict[str, float]) -> str:
    """Returns a table with a line for each figure: its value now, its recorded value, and whether they agree."""
    width = max(map(len, now))
    lines = [f"{'figure':<{width}} {'now':>12} {'on record':>12}"]
    for name, value in now.items():
        old = before.get(name)
        same = old is not None and abs(value - old) <= CLOSE * max(abs(value), abs(old))
        known = f"{old:>12.6g}" if old is not None else f"{'-':>12}"
        verdict = "" if old is None else "equal" if value == old else "close" if same else "differs"
        lines.append(f"{name:<{width}} {value:>12.6g} {known}  {verdict}".rstrip())
    return "\n".join(lines) + "\n"
