"""`eva-mim evaluate CLIP --suite datacomp38 --data DIR`: a CLIP model on a suite of test sets, as a table, JSON and Markdown."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eva_mim.core.errors import UserError
from eva_mim.core.log import say
from eva_mim.core.settings import few
from eva_mim.evaluate.suite import Suite, SuiteSet

COUNTS = ("images", "problems")
"""Figures that are numbers, not percentages."""
Figures = Mapping[str, Mapping[str, float]]
"""By the set's name its figures by name."""


def suite(options: argparse.Namespace) -> None:
    """Measures a CLIP model on the sets of a suite that are below a folder, after all have been checked; prints the table and
    writes it beside JSON. Raises UserError."""
    from eva_mim.core.distributed import is_main, run_on_main, setup
    from eva_mim.core.files import weights_sha256
    from eva_mim.evaluate.suite.measure import Model, figures_of
    from eva_mim.evaluate.suite.sets import folder_of, open_set
    from eva_mim.evaluate.zeroshot import FolderClip

    name, root = options.suite, Path(options.on[0])
    known = read_suite(name)
    if not root.is_dir():
        raise UserError(f"--data {root}: not a folder")
    places = {one.name: folder_of(one, root) for one in known.sets}
    missing = [name for name, place in places.items() if place is None]
    if len(missing) == len(places):
        raise UserError(f"--data {root}: none of the {len(places)} sets is there; expected folders such as "
                        f"{root / known.sets[0].homes[0]}/test/0.tar, as DataComp's download_evalsets.py writes them")
    path = options.to or options.checkpoint / f"{Path(name).stem}.json"
    if not os.access(path.absolute().parent, os.W_OK):
        raise UserError(f"{path} cannot be written: choose another place with --to")
    device = setup()
    if path.exists():
        say(f"  {path} is replaced")
    if missing:
        say(f"  {len(missing)} of {len(places)} sets are not in {root}: {few(missing, len(missing))}")
    clip = FolderClip(options.checkpoint, precision=options.precision or "fp32", device=device)
    opened = [open_set(one, place, train=options.probe) for one in known.sets if (place := places[one.name]) is not None]
    if options.probe and (without := [one.set.name for one in opened if one.classes and one.train is None]):
        say(f"  no probe for want of training images (train/0.tar, ...): {few(without, 10)}")
    model = Model(clip, weights_sha256(clip.model.state_dict()), options.batch or clip.batch, options.workers)
    about = {"suite": Path(name).stem, "checkpoint": str(options.checkpoint), "weights": model.sha256,
             "precision": clip.precision, "image_size": clip.image_size}
    found: dict[str, dict[str, float]] = {}
    for one in opened:
        found[one.set.name] = figures_of(model, one)
        say(f"  {one.set.name}: {one.set.metric} {found[one.set.name][one.set.metric]:.2f}")
        run_on_main(lambda: write(path, known, found, about))  # what a later set may stop is not lost
    if is_main():
        sys.stdout.write(table(known, found))


def read_suite(name: str) -> Suite:
    """Returns the sets of a suite that ships with the package, or of a file. Raises UserError."""
    from eva_mim.core.recipe_files import read_yaml
    from eva_mim.core.settings import parse

    path = name if name.endswith(".yaml") else f"configs/suites/{name}.yaml"
    return parse(Suite, read_yaml(path), path)


def means(known: Suite, found: Figures) -> list[tuple[str, float | None, str]]:
    """Returns the suite's own figures with a remark each: of every group of sets the mean, of all sets, and the robustness gap,
    the mean over all sets below ImageNet's accuracy, by which EVA's paper compares models. The mean of all is None unless all
    sets are there."""
    rows: list[tuple[str, float | None, str]] = []
    for group in dict.fromkeys(one.group for one in known.sets if one.group):
        names = [one for one in known.sets if one.group == group]
        rows.append(_mean(group, names, found, partly=True))
    rows.append(_mean("average", known.sets, found, partly=False))
    imagenet, every = next((value for name, value, _ in rows if name == "ImageNet"), None), _values(known.sets, found)
    if imagenet is not None and len(every) > 1:
        mean = sum(every) / len(every)
        rows.append(("robustness gap", mean - imagenet, f"mean of {len(every)} sets - ImageNet"))
    return rows


def _mean(name: str, sets: Sequence[SuiteSet], found: Figures, *, partly: bool) -> tuple[str, float | None, str]:
    values = _values(sets, found)
    whole = len(values) == len(sets)
    mean = sum(values) / len(values) if values and (whole or partly) else None
    return name, mean, f"of {len(sets)}" if whole else f"{len(values)} of {len(sets)}"


def _values(sets: Sequence[SuiteSet], found: Figures) -> list[float]:
    return [found[one.name][one.metric] for one in sets if one.name in found]


def table(known: Suite, found: Figures) -> str:
    """Returns a line for each set that was measured, and for each of the suite's own figures; 80 columns."""
    other: list[str] = []
    probed = any("probe_top1" in figures for figures in found.values())
    lines = [f"{'set':<24} {'images':>8}  {'metric':<18} {'value':>8}" + (f" {'probe':>8}" if probed else "")]
    for one in known.sets:
        if one.name not in found:
            continue
        figures = found[one.name]
        count = int(figures.get("problems", figures["images"]))
        if count != one.images:
            other.append(f"{one.name} {count}, not {one.images}")
        probe = f" {figures['probe_top1']:>8.2f}" if "probe_top1" in figures else ""
        mark = "*" if count != one.images else " "
        lines.append(f"{one.name:<24} {count:>8}{mark} {one.metric:<18} {figures[one.metric]:>8.2f}{probe}")
    lines += textwrap.wrap(f"* other numbers of images than the suite has: {'; '.join(other)}", 80) if other else []
    lines.append("")
    for name, value, remark in means(known, found):
        lines.append(f"{name:<24} {remark:>28} {'-' if value is None else f'{value:.2f}':>8}")
    return "\n".join(lines) + "\n"


def markdown(known: Suite, found: Figures) -> str:
    """Returns the table in Markdown, with all figures of each set."""
    columns = sorted({name for figures in found.values() for name in figures} - {"images"})
    lines = [f"| set | images | metric | {' | '.join(columns)} |", "|---" * (len(columns) + 3) + "|"]
    for one in known.sets:
        if one.name in found:
            figures = found[one.name]
            cells = [f"{figures[name]:.2f}" if name in figures else "" for name in columns]
            lines.append(f"| {one.name} | {int(figures['images'])} | {one.metric} | {' | '.join(cells)} |")
    lines += ["", "| figure | value | sets |", "|---|---|---|"]
    lines += [f"| {name} | {'' if value is None else f'{value:.2f}'} | {remark} |" for name, value, remark in means(known, found)]
    return "\n".join(lines) + "\n"


def write(path: Path, known: Suite, found: Figures, about: Mapping[str, Any]) -> None:
    """Writes the figures as JSON, and the table in Markdown beside it. Raises UserError."""
    from eva_mim.core.files import write_json, write_text

    metrics = {one.name: one.metric for one in known.sets if one.name in found}
    own = {name: {"value": value, "sets": remark} for name, value, remark in means(known, found)}
    try:
        sets = {name: {"metric": metrics[name]} | {key: int(value) if key in COUNTS else value for key, value in figures.items()}
                for name, figures in found.items()}
        write_json(path, {**about, "sets": sets, "means": own})
        write_text(path.with_suffix(".md"), markdown(known, found))
    except OSError as error:
        raise UserError(f"--to {path}: {error.strerror or error}") from None
