"""Dropping of teachers, by loops over images in float64."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eva_mim.core.batches import MaskedBatch
from eva_mim.core.contracts import Grid
from eva_mim.core.settings import parse
from eva_mim.targets import Cells, Target
from eva_mim.tasks.masked import Lesson, MaskedFeatures
from eva_mim.tasks.objectives import masked_mse, summary_cosine
from pretrain.mim_recipe import StageRecipe
from tests.tiny import MIM

IMAGES, SIDE, WIDTH = 6, 3, 4
PATCHES = SIDE * SIDE
LESSONS = {
    "a": Lesson(masked_mse, masked=2.0, visible=0.6),
    "b": Lesson(masked_mse, masked=0.4, upsample=2, summary=summary_cosine, summary_weight=2.0),
    "c": Lesson(summary=summary_cosine, summary_weight=2.5),
}


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Student(nn.Module):
    """Predictions that depend on the position alone."""

    grid: Grid = (SIDE, SIDE)
    image_size = 12

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.ParameterDict({
            "a": drawn(IMAGES, PATCHES, WIDTH, seed=1), "b": drawn(IMAGES, PATCHES, 4, WIDTH, seed=2),
            "b_summary": drawn(IMAGES, WIDTH, seed=3), "c_summary": drawn(IMAGES, WIDTH, seed=4),
        })

    def forward(self, images: Tensor, masked: Tensor, index: Tensor) -> dict[str, Tensor]:
        return {name: rows if "summary" in name else rows.flatten(0, 1)[index].reshape(-1, WIDTH)
                for name, rows in self.rows.items()}


class Grids:
    """A teacher's grid."""

    def __init__(self, grid: Grid):
        self.grid = grid

    def seen(self, grid: Grid) -> tuple[int, Grid]:
        return 12, self.grid


class Nothing:
    """Targets that are 0, or 1 in each channel of a summary."""

    def __init__(self) -> None:
        self.teachers: Any = {name: Grids((SIDE * lesson.upsample,) * 2) for name, lesson in LESSONS.items()}

    def __call__(self, batch: MaskedBatch, names: Collection[str] | None = None) -> Any:
        raise AssertionError

    def patches(self, batch: MaskedBatch, cells: Mapping[str, Cells]) -> dict[str, Target]:
        return {name: Target(torch.zeros(len(one.places), WIDTH), torch.ones(IMAGES, WIDTH)) for name, one in cells.items()}


def test_the_largest_loss_of_an_image_stays_and_dropped_ones_do_not_count() -> None:
    student, generator = Student(), torch.Generator().manual_seed(5)
    masked = torch.rand(IMAGES, PATCHES, generator=generator) < 0.5  # each image with another number
    drops = torch.rand(IMAGES, len(LESSONS), generator=generator) < 0.6
    batch = MaskedBatch(torch.arange(IMAGES), {12: torch.zeros(IMAGES, 3, 12, 12)}, masked, masked.flatten().nonzero()[:, 0],
                        visible_index=(~masked).flatten().nonzero()[:, 0], drops=drops)
    found = MaskedFeatures(student, Nothing(), LESSONS).loss(student, batch)
    found.loss.backward()

    rows = {name: value.detach().double() for name, value in student.rows.items()}
    error = {name: rows[name].square().mean(-1) for name in ("a", "b")}
    ones = torch.ones(1, WIDTH, dtype=torch.float64)
    apart = {name: 1 - torch.cosine_similarity(rows[name], ones) for name in rows if "_" in name}
    kept, first = torch.zeros(IMAGES, 3), set()
    for image in range(IMAGES):
        hidden, seen = masked[image], ~masked[image]
        totals = [
            2.0 * error["a"][image, hidden].mean() + 0.6 * error["a"][image, seen].mean(),
            0.4 * error["b"][image, hidden].mean() + 2.0 * apart["b_summary"][image],
            2.5 * apart["c_summary"][image],
        ]
        worst = max(range(3), key=lambda one: totals[one])
        first.add(worst)
        for one in range(3):
            kept[image, one] = float(one == worst or not drops[image, one])
    assert 6 < kept.sum() < 15
    assert len(first) > 1
    wanted = {
        "a": sum(kept[i, 0] * error["a"][i, masked[i]].sum() for i in range(IMAGES)) / masked.sum(),
        "a_visible": sum(kept[i, 0] * error["a"][i, ~masked[i]].sum() for i in range(IMAGES)) / (~masked).sum(),
        "b": sum(kept[i, 1] * error["b"][i, masked[i]].sum() for i in range(IMAGES)) / (4 * masked.sum()),
        "b_summary": (kept[:, 1] * apart["b_summary"]).mean(),
        "c_summary": (kept[:, 2] * apart["c_summary"]).mean(),
    }
    assert {name: term.mean.item() for name, term in found.terms.items()} == {
        name: pytest.approx(float(value), abs=1e-6) for name, value in wanted.items()}
    assert found.terms["c_summary"].metrics["summary_kept_c"].item() == pytest.approx(kept[:, 2].mean().item())
    for column, name in ((1, "b_summary"), (2, "c_summary")):
        gradient = student.rows[name].grad
        assert gradient is not None
        assert torch.equal(gradient.abs().sum(1) > 0, kept[:, column] > 0)


def test_it_is_refused_where_nothing_could_be_dropped() -> None:
    with pytest.raises(Exception, match=r"teacher_drop=0\.5 has no effect where each image has one teacher"):
        parse(StageRecipe, MIM | {"teacher_drop": 0.5}, "recipe")
