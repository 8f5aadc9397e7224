"""Figures of a masked stage's heads over image sizes: a student that switches between two representations shows a jump."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from eva_mim.core.batches import MaskedBatch
from eva_mim.core.contracts import Teacher
from eva_mim.students.heads import resampled


class AtSize(NamedTuple):
    """Figures of a head at one size of the student's images."""

    size: int
    cosine: float
    """Mean cosine of patches with the teacher's; NaN if they are not predicted."""
    error: float
    """Squared error of patches / variance of the teacher's; NaN likewise."""
    summary: float
    """Mean cosine of summaries; NaN if they are not predicted."""


def over_sizes(
    model: Any, teachers: Mapping[str, Teacher], batches: Callable[[int], Iterable[MaskedBatch]], sizes: Sequence[int],
    device: torch.device, done: Callable[[int], None] = lambda size: None,
) -> dict[str, list[AtSize]]:
    """Returns the figures of each adaptor of a model (`weights.adaptors.FeatureModel`) by size, on held-out images. `batches`
    returns batches with views of the student's size and of the teachers', each of which sees its own size. The student's patches
    are brought to the teacher's grid by bilinear interpolation. `done` is told of each size."""
    found: dict[str, list[AtSize]] = {name: [] for name in teachers}
    for size in sizes:
        sums: dict[str, Tensor] = {}
        for batch in batches(size):
            batch = batch.to(device)
            with torch.no_grad():
                said = model(batch.views[size].float() / 255, adaptors=list(teachers))
                for name, teacher in teachers.items():
                    grid = model.grid_of(batch.views[size], name)
                    sums[name] = sums.get(name, 0) + _sums(said[name], teacher(batch.views[teacher.image_size]), grid)
        for name, total in sums.items():
            cosine, patches, error, squares, summary, images, *mean = total.tolist()
            nothing = float("nan")
            variance = squares - sum(value * value for value in mean) / patches if patches else nothing
            found[name].append(AtSize(size, cosine / patches if patches else nothing, error / variance if patches else nothing,
                                      summary / images if images else nothing))
        done(size)
    return found


def _sums(said: Any, wanted: Any, grid: tuple[int, int]) -> Tensor:
    """Returns sums over a batch, in float64: cosines, patches, squared errors, squares, cosines of summaries, images, and each
    channel of the teacher's patches."""
    parts = torch.zeros(6, dtype=torch.float64, device=wanted.spatial.device)
    channels = wanted.spatial.double().sum((0, 1))
    if said.spatial.shape[-1]:
        there, target = resampled(said.spatial, grid, wanted.grid).double(), wanted.spatial.double()
        parts[0] = F.cosine_similarity(there, target, dim=-1).sum()
        parts[1] = target.shape[0] * target.shape[1]
        parts[2], parts[3] = (there - target).square().sum(), target.square().sum()
    if said.summary.shape[-1]:
        parts[4] = F.cosine_similarity(said.summary.double(), wanted.summary.double(), dim=-1).sum()
        parts[5] = len(said.summary)
    return torch.cat([parts, channels])


def jumps(found: Mapping[str, Sequence[AtSize]], limit: float) -> list[str]:
    """Returns in words where a cosine changes by more than `limit` from one size to the next."""
    said = []
    for name, rows in found.items():
        for before, after in pairwise(rows):
            for what, old, new in (("patches", before.cosine, after.cosine), ("summary", before.summary, after.summary)):
                if abs(new - old) > limit:
                    said.append(f"{name}, {what}: cosine {old:.3f} at {before.size} px, {new:.3f} at {after.size} px")
    return said
