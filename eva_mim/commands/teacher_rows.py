"""`eva-mim teacher check` of a recipe with several teachers: a row for each, beside the student that learns from them."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from eva_mim.core.recipe_files import read_yaml
from eva_mim.core.registry import PROGRAMS, lookup
from eva_mim.core.resolve import resolve

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from eva_mim.core.bands import Bands
    from eva_mim.core.contracts import Teacher

COLUMNS = ("teacher", "px", "grid", "width", "std", "spread", "ms", "cost")
MEANING = ("std: of all patch features. spread: mean squared angle of summaries to their\n"
           "mean direction. ms: milliseconds an image. cost: share of all teachers and the\n"
           "student's forward pass.")


class Row(NamedTuple):
    """What is measured of a teacher."""

    std: float
    spread: float
    """NaN without a summary."""
    seconds: float
    """Of one image."""


def check_recipe(path: str, overrides: Sequence[str], pictures: Sequence[Image | Bands], shown: str) -> None:
    """Prints a row for each teacher of a recipe. Raises UserError for networks that cannot be used, and for a size that does not
    fit, with the ways out."""
    import torch

    from eva_mim.core.devices import pick_device

    stage = lookup(PROGRAMS, "mim", "program")
    recipe = resolve(stage.recipe, read_yaml(path), overrides, path)
    stage.on_meta(recipe)  # sizes that do not fit are told before weights are read
    made, device = stage.networks(recipe), pick_device("auto")
    student = made.student.to(device).eval()
    with torch.no_grad():
        rows = {name: _measured(teacher.to(device), pictures, device) for name, teacher in made.teachers.items()}
        images = viewed(student.image_size, pictures[:8]).to(device)
        own = _seconds(lambda: student.tokens(images)) / len(images)
    total = own + sum(row.seconds for row in rows.values())
    write = sys.stdout.write
    grid = f"{student.grid[0]}x{student.grid[1]}"
    write(f"student {recipe.student.name}: {student.image_size} px, {grid} patches, {1000 * own:.1f} ms, "
          f"cost {own / total:.0%}\n{shown}, on {device}\n\n")
    line = "{:<12} {:>5} {:>7} {:>6} {:>9} {:>7} {:>8} {:>5}\n"
    write(line.format(*COLUMNS))
    for name, teacher in made.teachers.items():
        row, facts = rows[name], teacher.facts()
        spread = "-" if row.spread != row.spread else f"{row.spread:.3f}"
        there = f"{teacher.grid[0]}x{teacher.grid[1]}"
        write(line.format(name, teacher.image_size, there, teacher.width, f"{row.std:.4g}", spread, f"{1000 * row.seconds:.1f}",
                          f"{row.seconds / total:.0%}"))
        for text in _read(recipe, name, teacher, facts):
            write(f"  {text}\n")
    write(f"\n{MEANING}\n")


def _read(recipe: Any, name: str, teacher: Teacher, facts: dict[str, Any]) -> list[str]:
    """Returns what is read of a teacher and what the student learns of it, in lines."""
    objective, normaliser = recipe.objective_of(name), recipe.normaliser_of(name)
    layer = f"block {facts['layer']} of 0 to {facts['blocks'] - 1}" if facts.get("blocks") else "its end"
    norm = ", last norm" if facts.get("final_norm") else ""
    patches = f"patches: {layer}{norm}{', projected' if facts.get('project') else ''}"
    learned = f"loss {objective.kind}, normaliser {normaliser.kind}" if objective.kind else "not learned"
    lines = [f"{patches}; {learned}"]
    if teacher.summary_width:
        summary = f"loss {objective.summary}" if objective.summary else "not learned"
        lines.append(f"summary: {facts.get('summary', 'its own')}, width {teacher.summary_width}; {summary}")
    else:
        lines.append("summary: it has none")
    if "follows" in facts:
        lines.append(f"follows the student's sizes: {', '.join(map(str, facts['follows']))} px")
    groups = [group for group, one in recipe.groups.items() if one.teachers is None or name in one.teachers]
    if groups:
        lines.append(f"groups: {', '.join(groups)}")
    return lines


def _measured(teacher: Teacher, pictures: Sequence[Image | Bands], device: torch.device) -> Row:
    from eva_mim.tasks.objectives import SummaryAngle

    images = viewed(teacher.image_size, pictures).to(device)
    found = [teacher(part) for part in images.split(8)]  # type: ignore[no-untyped-call]
    seconds = _seconds(lambda: teacher(images[:8])) / min(8, len(images))
    import torch

    spatial = torch.cat([features.spatial.float().flatten(0, 1) for features in found])
    spread = float("nan")
    if teacher.summary_width:
        angle = SummaryAngle(teacher.summary_width).to(device)
        summaries = torch.cat([features.summary for features in found])
        for _ in range(2):  # angles are measured from the mean direction, which is known the second time
            angle.add(summaries)
            angle.gather()
        spread = float(angle.dispersion())
    return Row(float(spatial.std()), spread, seconds)


def viewed(size: int, pictures: Sequence[Image | Bands]) -> torch.Tensor:
    """Returns pictures as [B, channels, size, size], resized and cropped as in evaluation."""
    import random

    import torch

    from eva_mim.data.views import EvalView

    view = EvalView([size])
    return torch.stack([view(picture, random.Random(0))[size] for picture in pictures])


def _seconds(work: Any) -> float:
    """Returns the seconds of the second call: the first one may still set up the device."""
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        found = work()
        float(getattr(found, "spatial", found).sum())  # waits for the device
        seconds = time.perf_counter() - started
    return seconds


def several(path: str, name: str | None) -> bool:
    """Returns whether a text names a recipe with several teachers, none of which was chosen."""
    if name is not None or not Path(path).is_file():
        return False
    teachers = read_yaml(path).get("teachers")
    return isinstance(teachers, dict) and len(teachers) > 1
