"""Recipes of several teachers: all build on the meta device, and the published numbers are in them (facts/radio_vitamin.md)."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from eva_mim.core.recipe_files import read_yaml
from eva_mim.core.settings import parse
from eva_mim.pipeline.networks import check_networks
from eva_mim.pipeline.plan import plan
from pretrain.mim import STAGE
from pretrain.mim_recipe import StageRecipe
from tests.conftest import REPOSITORY

CONFIGS = REPOSITORY / "configs"
RECIPES = sorted(path for path in (CONFIGS / "mim").glob("*.yaml") if len(read_yaml(str(path)).get("teachers") or ()) > 1)


class Published(NamedTuple):
    """Section 1.4 and 5 of the facts: sizes, batch, steps, optimizer."""

    sizes: dict[str, int]
    """Of the groups' students by name."""
    batch: int
    steps: int
    grids: dict[str, int]
    """Side of the grid of each teacher's own size."""
    optimizer: str
    lr: float = 1e-3
    weight_decay: float = 0.02
    prefix: int = 8


CLIPS = {"clip": 16, "dino": 16}
PUBLISHED = {
    "amradio_h_256": Published({"all": 256}, 1024, 300_000, {**CLIPS, "openai": 16}, "adamw"),
    "amradio_h_432": Published({"low": 432, "high": 1024}, 1152, 300_000, {"clip": 27, "openai": 27, "dino": 27, "sam": 64},
                               "adamw"),
    "radio25_256": Published({"all": 256}, 1024, 300_000, {**CLIPS, "siglip": 16, "sam": 64}, "lamb"),
    "radio25_432": Published({"all": 432}, 1024, 300_000, {"clip": 27, "siglip": 27, "dino": 27, "sam": 64}, "lamb"),
    "radio25_432_1024": Published({"low": 432, "high": 1024}, 1152, 300_000,
                                  {"clip": 27, "siglip": 27, "dino": 27, "sam": 64}, "lamb"),
}


def recipe(path: Path) -> StageRecipe:
    return parse(StageRecipe, read_yaml(str(path)), path.name)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_builds_without_weights_and_images(path: Path) -> None:
    if "runs/cifar10_teachers" in path.read_text():
        pytest.skip("its teachers are stages that tools/cifar10_teachers.py trains")
    made = recipe(path)
    networks = STAGE.on_meta(made)
    assert networks.student.summary_head.keys() == {name for name in networks.teachers if made.objective_of(name).summary}
    ranks = sum(group.ranks or 0 for group in made.groups.values()) or 1
    cuts = [made.pieces(rank, ranks) for rank in range(ranks)]
    covered = sorted((piece.first, piece.last) for pieces in cuts for piece in pieces)
    assert covered[0][0] == 0
    assert covered[-1][1] == made.run.global_batch
    assert all(before[1] == after[0] for before, after in pairwise(covered))
    assert len({len(pieces) for pieces in cuts}) == 1


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_has_its_numbers(name: str) -> None:
    wanted, made = PUBLISHED[name], recipe(CONFIGS / "mim" / f"{name}.yaml")
    networks = STAGE.on_meta(made)
    sizes = {key: group.image_size or networks.student.image_size for key, group in made.all_groups.items()}
    assert sizes == wanted.sizes
    assert made.run.global_batch == wanted.batch
    assert made.run.steps(0) == wanted.steps
    assert {key: teacher.grid[0] for key, teacher in networks.teachers.items()} == wanted.grids
    assert (made.optim.optimizer, made.optim.lr, made.optim.weight_decay) == (
        wanted.optimizer, wanted.lr, wanted.weight_decay)
    assert networks.student.prefix == wanted.prefix
    assert made.mask.ratio == 0
    for key, teacher in networks.teachers.items():
        assert bool(teacher.summary_width) == (key != "sam")
    if name.startswith("radio25"):
        assert made.normaliser.kind == "phi_s"
        assert (made.normaliser.steps, made.normaliser.every, made.optim.heads.alone) == (3000, 100, 5000)
    # Nothing is interpolated but at 1,024 px.
    assert all(teacher.interpolate is None for teacher in made.all_teachers.values()) == (name != "radio25_432_1024")


@pytest.mark.parametrize("name", [
    "radio25_b", *(pytest.param(name, marks=pytest.mark.long) for name in ("amradio_h", "radio25_l", "radio25_h"))])
def test_the_stages_of_a_pipeline_hand_over(name: str, tmp_path: Path) -> None:
    _, planned = plan(str(CONFIGS / "pipelines" / f"{name}.yaml"), [], tmp_path)
    check_networks(planned, set())
    for before, after in pairwise(planned):
        made: Any = after.recipe
        assert made.init_from == made.init_heads == str(before.out)
        assert made.student.name == before.recipe.student.name
