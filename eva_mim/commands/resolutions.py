"""`eva-mim evaluate RUN --resolution-sweep 128..1024`: what each head says over image sizes, as a table and a picture."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eva_mim.commands import chart
from eva_mim.core.errors import UserError

if TYPE_CHECKING:
    from eva_mim.evaluate.resolutions import AtSize

JUMPED = 1
"""Exit code after a jump."""
JUMP, IMAGES = 0.15, 500
"""Largest change of a cosine that is no jump, and images of a sweep, by default."""
SIZES = 9
"""Sizes of a sweep without a step, evenly spread over the logarithm."""


def sizes_of(text: str, patch: int) -> list[int]:
    """Returns the sizes of "128..1024" (nine of them) or "128..1024:64", as whole patches. Raises UserError."""
    match = re.fullmatch(r"(\d+)\.\.(\d+)(?::(\d+))?", text)
    if not match:
        raise UserError(f"--resolution-sweep {text}: write FIRST..LAST or FIRST..LAST:STEP, in pixels")
    first, last, step = (int(part) if part else None for part in match.groups())
    assert first is not None
    assert last is not None
    if not 0 < first < last or step == 0:
        raise UserError(f"--resolution-sweep {text}: the first size must be smaller than the last, and the step above 0")
    if step:
        wanted: list[float] = list(range(first, last + 1, step))
    else:
        wanted = [first * (last / first) ** (number / (SIZES - 1)) for number in range(SIZES)]
    return sorted({max(1, round(size / patch)) * patch for size in wanted})


def sweep(options: argparse.Namespace) -> int:
    """Measures the heads of a finished masked stage at several sizes, prints the table and writes the picture; returns 1 if a
    cosine jumps from one size to the next. Raises UserError."""
    import eva_mim
    from eva_mim.core.distributed import setup
    from eva_mim.core.log import Progress
    from eva_mim.core.recipe_files import read_yaml
    from eva_mim.core.registry import PROGRAMS, lookup
    from eva_mim.core.resolve import resolve
    from eva_mim.core.run_folder import RunFolder
    from eva_mim.data.loader import EvalLoader
    from eva_mim.data.preparation import MaskedPreparation
    from eva_mim.data.splits import open_splits
    from eva_mim.data.views import EvalView
    from eva_mim.evaluate.resolutions import jumps, over_sizes
    from eva_mim.run.loaders import eval_batch

    folder = RunFolder(options.checkpoint)
    if folder.record().get("program") != "mim":
        raise UserError(f"{options.checkpoint}: --resolution-sweep is for a finished masked stage (mim)")
    tree = read_yaml(folder.settings)
    tree["targets"] = {"cached": None}  # the teachers see other images than those of a cache
    stage, source = lookup(PROGRAMS, "mim", "program"), str(folder.settings)
    recipe = resolve(stage.recipe, tree, options.overrides, source)
    device = setup(recipe.run.device)
    model: Any = eva_mim.load(options.checkpoint).to(device)
    if model.patch is None:
        raise UserError(f"{options.checkpoint}: {recipe.student.name} takes one size alone")
    images = IMAGES if options.images is None else options.images
    sizes = sizes_of(options.resolution_sweep, model.patch[0])
    teachers = {name: teacher.to(device) for name, teacher in stage.networks(recipe).teachers.items()}
    splits, theirs = open_splits(recipe.data), [teacher.image_size for teacher in teachers.values()]

    def batches(size: int) -> Any:
        made = MaskedPreparation(EvalView([size, *theirs], recipe.view.crop_pct), 0, training=False)
        return EvalLoader(splits.val, made, eval_batch(recipe), options.workers, min(images, recipe.evaluate.images))

    progress = Progress("sizes", len(sizes))
    found = over_sizes(model, teachers, batches, sizes, device, lambda size: progress.advance())
    sys.stdout.write(table(found))
    path = options.to or options.checkpoint / "resolutions.png"
    draw(found, path)
    sys.stdout.write(f"{path}\n")
    jump = JUMP if options.jump is None else options.jump
    for line in (jumped := jumps(found, jump)):
        sys.stdout.write(f"jump of more than {jump:g}: {line}\n")
    return JUMPED if jumped else 0


def table(found: Mapping[str, Sequence[AtSize]]) -> str:
    """Returns a line for each teacher and size: cosine and squared error / variance of patches, cosine of summaries."""
    lines = [f"{'teacher':<16} {'px':>5} {'cosine':>8} {'error':>8} {'summary':>8}"]
    for name, rows in found.items():
        for row in rows:
            figures = ("-" if math.isnan(value) else f"{value:.4f}" for value in row[1:])
            lines.append(f"{name:<16} {row.size:>5} " + " ".join(f"{figure:>8}" for figure in figures))
    return "\n".join(lines) + "\n"


def draw(found: Mapping[str, Sequence[AtSize]], path: Path) -> None:
    """Writes the cosines over the sizes as a PNG. Raises UserError for a place that cannot be written."""
    series = [chart.Series(name, [(row.size, row.cosine) for row in rows if not math.isnan(row.cosine)],
                           [(row.size, row.summary) for row in rows if not math.isnan(row.summary)])
              for name, rows in found.items()]
    sizes = sorted({float(row.size) for rows in found.values() for row in rows})
    panel = chart.Panel("cosine with the teacher over the side of the image in pixels", series, ticks=sizes)
    chart.draw([panel], path, note="line: patches, dots: summary")
