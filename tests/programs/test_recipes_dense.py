"""Recipes of segmentation and video: published numbers, and every recipe builds without memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eva_mim.core.recipe_files import read_yaml
from eva_mim.core.registry import PROGRAMS, lookup
from eva_mim.core.settings import parse
from tests.conftest import REPOSITORY

CONFIGS = REPOSITORY / "configs"
ALL = [(program, path) for program in ("segment", "video") for path in sorted((CONFIGS / program).glob("*.yaml"))]


def recipe_of(program: str, path: Path) -> Any:
    return parse(lookup(PROGRAMS, program, "program").recipe, read_yaml(str(path)), path.name)


@pytest.mark.parametrize(("program", "path"), ALL, ids=[path.stem for _, path in ALL])
def test_a_recipe_builds_on_the_meta_device(program: str, path: Path) -> None:
    stage = lookup(PROGRAMS, program, "program")
    recipe = recipe_of(program, path)
    student = stage.on_meta(recipe, 17).student
    assert all(parameter.is_meta for parameter in student.parameters())
    heads = [shape for shape in (tuple(value.shape) for value in student.parameters()) if shape and shape[0] == 17]
    assert heads
    assert student.image_size == recipe.student.image_size or recipe.student.image_size is None


@pytest.mark.parametrize(("name", "blocks", "batch", "steps", "figure", "size", "trunk"), [
    ("eva02_b_ade20k_512", [3, 5, 7, 11], 32, 60_000, "55.3", 512, 86),
    ("eva02_l_ade20k_512", None, 16, 80_000, "59.8", 512, 304),
    ("radio25_linear_ade20k", None, 16, 160_000, "48.94, 51.47, 51.58", 512, 86),
    ("radio25_linear_voc", None, 16, 160_000, "84.35, 85.49, 85.97", 512, 86),
])  # fmt: skip
def test_published_segmentation(
    name: str, blocks: list[int] | None, batch: int, steps: int, figure: str, size: int, trunk: int
) -> None:
    path = CONFIGS / "segment" / f"{name}.yaml"
    recipe = recipe_of("segment", path)
    assert (recipe.run.global_batch, recipe.student.image_size) == (batch, size)
    made = recipe.run.epochs * (recipe.data.expected // batch)
    assert made == pytest.approx(steps, rel=0.006)
    assert blocks is None or list(recipe.student.head.blocks) == blocks
    assert figure in path.read_text()
    rates = recipe.optim.lr, recipe.optim.warmup_steps, recipe.optim.schedule
    assert rates == ((6e-5 if name.startswith("eva02") else 1e-3), 1500, "linear")
    assert recipe.student.frozen == name.startswith("radio")
    student = lookup(PROGRAMS, "segment", "program").on_meta(recipe).student
    assert sum(value.numel() for value in student.trunk.parameters()) / 1e6 == pytest.approx(trunk, abs=1)
    if name.startswith("eva02"):
        assert round(size * recipe.evaluate.stride) == 341


def test_published_video() -> None:
    first, second = (recipe_of("video", CONFIGS / "video" / f"eva01_g_{name}.yaml") for name in ("k722", "k400"))
    assert (first.student.frames, first.run.epochs, first.optim.lr, first.run.global_batch) == (8, 40, 8e-6, 256)
    assert (second.student.frames, second.run.epochs, second.optim.lr, second.optim.layer_decay) == (16, 1, 1e-6, 0.95)
    assert (second.view.crops, second.view.clips, second.student.time) == (3, 4, "joint")
