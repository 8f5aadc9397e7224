"""`eva-mim labels WHAT`: names the ImageNet layout of a dataset's or checkpoint's class list, before a head is trained on it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from eva_mim.core.errors import UserError
from eva_mim.core.settings import few
from eva_mim.data.class_lists import (
    LAYOUTS,
    WINTER21,
    class_hash,
    class_id,
    describe,
    layout_classes,
    layout_of,
    matches,
    positions,
    read_classes,
)
from eva_mim.run.program import guard

TARGET = "imagenet-1k"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code, 0 or 2 if there is no class list or not the expected one."""
    parser = argparse.ArgumentParser(prog="eva-mim labels", description="Name the layout of a class list.")
    parser.add_argument(
        "what", help="class folders, a folder with one tar a synset, shards with their classes.txt, a file with a class a line, "
        "a stage's result"
    )
    parser.add_argument("--expect", metavar="LAYOUT", help=f"fail (2) unless it is this one: {', '.join((*LAYOUTS, WINTER21))}")
    options = parser.parse_args(argv)
    return guard(lambda: check(options.what, options.expect))


def check(what: str, expected: str | None = None) -> None:
    """Prints a report on a class list. Raises UserError if there is none, or if its layout is not the expected one."""
    if expected is not None and expected != WINTER21:
        layout_classes(expected)  # raises UserError for an unknown layout
    classes = read_classes(what)
    sys.stdout.write(report(classes))
    if expected is not None and layout_of(classes) != expected:
        raise UserError(f"{what}: not {expected}, but {describe(classes)}")


def report(classes: Sequence[str]) -> str:
    """Returns a text with size, hash and layout of a class list, its differences from the nearest layout, and the number of
    classes of ImageNet-1k in it."""
    lines = [f"classes   {len(classes)}, {few([class_id(name) for name in classes])}", f"hash      {class_hash(classes)}",
             f"layout    {describe(classes)}"]
    nearest = matches(classes)[0]
    if layout_of(classes) is None and len(nearest.extra) < len(classes):
        lines += [f"  {what:<8}{few(names)}" for what, names in (("missing", nearest.missing), ("extra", nearest.extra)) if names]
        if not nearest.missing and not nearest.extra:
            lines.append("  the classes are the same and the order is not: labels and heads of one do not fit the other")
    target = layout_classes(TARGET)
    absent = [name for name, place in zip(target, positions(target, classes), strict=True) if place is None]
    if len(absent) < len(target):
        without = f", without {few(absent)}" if absent else ""
        lines.append(f"{TARGET:<9} {len(target) - len(absent)} of its {len(target)} classes{without}")
    return "\n".join(lines) + "\n"
