"""`eva-mim convert`: its arguments, and the table that it prints."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from eva_mim.convert.targets import FORMATS
from eva_mim.core.errors import UserError
from eva_mim.core.run_folder import SEGMENTATION
from eva_mim.run.program import guard

DTYPES = ("float32", "float16", "bfloat16")
DESCRIPTION = "\n".join([
    "Write a checkpoint in another program's format, and prove the result: the same images go through source and result.\n",
    *("  {:<13} {}".format(form.name, form.help.replace("\n", "\n" + " " * 16)) for form in FORMATS.values()),
])


def main(argv: Sequence[str] | None = None) -> int:
    """Converts a checkpoint; returns the exit code, 2 for a source that is unknown, and for a conversion that is impossible or
    not proved."""
    parser = argparse.ArgumentParser(
        prog="eva-mim convert", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("src", type=Path, metavar="SRC", help="file or folder that `eva-mim inspect` can read")
    parser.add_argument("dst", type=Path, metavar="DST", help="file or folder to write; a record is written beside or into it")
    parser.add_argument("--to", required=True, choices=FORMATS)
    parser.add_argument("--container", metavar="NAME", help="part of a torch file (model_ema, ...) or file of a folder")
    parser.add_argument("--architecture", metavar="NAME", help="timm's or open_clip's name; default: found by names and shapes")
    parser.add_argument("--argument", action="append", default=[], metavar="K=V",
                        help="keyword of the timm model that names and shapes do not determine, such as num_heads=16; repeatable")
    parser.add_argument("--grid", type=_pair, metavar="RxC", help="rows and columns of the source's patches, if unknown")
    parser.add_argument("--image-size", type=_pair, metavar="N|HxW", help="of the result, in pixels")
    parser.add_argument("--patch-size", type=_side, metavar="N", help="of the result, in pixels")
    parser.add_argument("--positions", choices=("timm", "original", "eva-clip"), default="timm",
                        help="rule for another grid: bicubic with antialias (timm), without (EVA), or aligned corners (EVA-CLIP)")
    parser.add_argument("--kernel", choices=("pseudo-inverse", "bicubic"), default="pseudo-inverse",
                        help="rule for another patch size: function-preserving (FlexiViT, timm), or plain (EVA)")
    parser.add_argument("--norm", choices=("keep", "copy", "drop"), default="keep",
                        help="for a classifier that pools by the mean: norm becomes fc_norm (timm), or is left out (EVA)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the floating tensors; default as they are")
    parser.add_argument("--images", type=Path, metavar="DIR", help="images for the parity figure; default drawn scenes and noise")
    parser.add_argument("--max-difference", type=_share, metavar="X",
                        help="largest difference, over an output's largest value; default 2e-5, float16 1e-2, bfloat16 8e-2")
    parser.add_argument("--adaptors", metavar="NAME,...|all", help="of a masked stage: with --to onnx also what its heads say "
                        "for these teachers, input from 0 to 1; with --to hf one of them, or backbone, as a vision tower")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--json", action="store_true", help="print the record")
    options = parser.parse_args(argv)

    def work() -> None:
        if options.adaptors:
            return _adaptors(options)
        if options.to == "onnx" and (options.src / SEGMENTATION).is_file():
            from eva_mim.convert.adaptors import convert_segmenter

            return _say(convert_segmenter(options.src, options.dst, overwrite=options.overwrite), options)
        from eva_mim.convert.convert import Options, convert

        record = convert(options.src, options.dst, options.to, Options(
            container=options.container, architecture=options.architecture, arguments=_arguments(options.argument),
            grid=options.grid, image_size=options.image_size, patch_size=options.patch_size, positions=options.positions,
            kernel=options.kernel, norm=options.norm, dtype=options.dtype, images=options.images, bound=options.max_difference,
            overwrite=options.overwrite,
        ))
        sys.stdout.write(json.dumps(record, indent=2) + "\n" if options.json else table(record, options.dst))

    return guard(work)


def _adaptors(options: argparse.Namespace) -> None:
    from eva_mim.convert.adaptors import convert_adaptors, convert_tower

    if options.to not in ("onnx", "hf"):
        raise UserError(f"--adaptors goes with --to onnx or hf, not {options.to}: the folder of a stage has its heads already")
    work = convert_adaptors if options.to == "onnx" else convert_tower
    _say(work(options.src, options.dst, options.adaptors.split(","), overwrite=options.overwrite), options)


def _say(record: dict[str, Any], options: argparse.Namespace) -> None:
    from eva_mim.convert.adaptors import report

    sys.stdout.write(json.dumps(record, indent=2) + "\n" if options.json else report(record, options.dst))


def table(record: Mapping[str, Any], dst: Path) -> str:
    """Returns the record as a table."""
    source, found, keys = record["source"], record["architecture"], record["keys"]
    rows = [
        ("source", f"{source['path']}  ({source['kind']}, {source['container']}, names of {source['names']})"),
        ("model", f"{found['library']} {found['name'] or 'without a name'}"
         + "".join(f" {name}={value}" for name, value in found["arguments"].items())),
        ("image", " x ".join(map(str, record["image_size"])) + (f" px, {record['grid'][0]} x {record['grid'][1]} patches"
                                                                if record["grid"] else " px")),
        ("written", f"{dst}  ({', '.join(record['files'])})"),
        ("loaded", f"{len(keys['loaded'])} tensors"),
    ]
    for kind in ("resized", "new", "ignored"):
        rows += [(kind, line) for line in _by_reason(keys[kind], keys.get("reasons", {}))]
    for what, parity in record["parity"].items():
        rows.append(("parity", f"{what} (bound {parity['bound']:g} of the largest value):"))
        rows += [("parity", f"  {name:<7} {found['shape']}  largest difference {found['largest']:.3g} of {found['source']:.3g}, "
                  f"cosine {found['cosine']:.6f}") for name, found in parity["outputs"].items()]
    if record["answers_after_change"]:
        rows.append(("change", f"cosine of each image's answer before and after it: {record['answers_after_change']}"))
    rows.append(("open with", record["open_with"]))
    lines, last = [], ""
    for name, value in rows:
        lines.append(f"{'' if name == last else name:<10} {value}\n")
        last = name
    return "".join(lines)


def _by_reason(names: Sequence[str], reasons: Mapping[str, str]) -> list[str]:
    counts = Counter(reasons.get(name, "") for name in names)
    lines = []
    for reason, count in counts.items():
        listed = [name for name in names if reasons.get(name, "") == reason]
        lines.append(f"{', '.join(listed[:3])}{f' and {count - 3} more' if count > 3 else ''}: {reason}")
    return lines


def _side(text: str) -> int:
    """Returns an integer from 1 to 10000."""
    if not text.isdecimal() or not 0 < int(text) <= 10_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to 10000")
    return int(text)


def _pair(text: str) -> tuple[int, int]:
    """Returns (rows, columns) or (height, width) of N or HxW."""
    sides = text.lower().split("x")
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} is neither N nor HxW")
    return _side(sides[0]), _side(sides[-1])


def _share(text: str) -> float:
    """Returns a number from 0 to 1."""
    with suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to 1")


def _arguments(given: Sequence[str]) -> dict[str, Any]:
    """Returns keywords from arguments of the form K=V; V is read as YAML."""
    found: dict[str, Any] = {}
    for item in given:
        name, sign, value = item.partition("=")
        if not sign or not name.isidentifier():
            raise UserError(f"--argument {item}: not of the form NAME=VALUE")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"--argument {item}: {str(error).splitlines()[0]}") from None
    return found
