"""Targets of a masked stage: what they depend on, and whether a cache has those of a recipe."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from eva_mim.core.contracts import Teacher
from eva_mim.core.distributed import run_on_main
from eva_mim.core.errors import UserError
from eva_mim.core.log import say
from eva_mim.core.settings import differences, few
from eva_mim.data.sampler import evenly
from eva_mim.data.splits import Splits
from eva_mim.data.store.files import Dtype, FeatureStore, SplitFacts, StoreFacts, read_facts
from eva_mim.data.store.write import described
from eva_mim.targets.cached import StoredTeacher
from eva_mim.weights.files.read import content_hash

if TYPE_CHECKING:
    from pretrain.mim import StageRecipe


def facts_of(
    recipe: StageRecipe, splits: Splits, teachers: dict[str, Teacher], views: int, dtype: Dtype, device: torch.device,
    components: int | None, variance: dict[str, float],
) -> StoreFacts:
    """Returns what the targets of a recipe depend on, and how they are stored. Every rank must call."""
    networks = {}
    for name, teacher in teachers.items():
        file = run_on_main(partial(_file_hash, recipe, name))
        settings = _settings(recipe, name, in_file=file is not None)
        networks[name] = described(teacher, len(teacher.mean), device, file=file, settings=settings)
    return StoreFacts(
        networks=networks, inputs={"precision": recipe.run.precision, "view": _view(recipe), "data": _data(recipe, splits)},
        splits={"train": SplitFacts(images=len(splits.train), views=views),
                "val": SplitFacts(images=evenly(len(splits.val), recipe.evaluate.images))},
        dtype=dtype, components=components, variance=variance,
    )


def stored_teachers(recipe: StageRecipe) -> dict[str, StoredTeacher]:
    """Returns the teachers whose features are in the recipe's cache, by name. Raises UserError for a cache of other teachers."""
    assert recipe.targets.cached is not None
    facts = read_facts(recipe.targets.cached)
    known = {name: one.network for name, one in facts.networks.items()}
    wanted = {name: _settings(recipe, name, in_file=known.get(name, {}).get("file") is not None) for name in recipe.all_teachers}
    _refuse(recipe, {name: one.get("settings") for name, one in known.items()}, wanted, "teachers")
    return {name: StoredTeacher(one) for name, one in known.items()}


def open_store(recipe: StageRecipe, splits: Splits) -> FeatureStore | None:
    """Returns the recipe's cache of targets; None without one. Every rank must call. Raises UserError for a cache of other
    images, views or teachers, which are named."""
    if recipe.targets.cached is None:
        return None
    store = FeatureStore(recipe.targets.cached)
    facts = store.facts
    stored_teachers(recipe)
    for name, one in facts.networks.items():
        if (now := run_on_main(partial(_file_hash, recipe, name))) not in (None, one.network["file"]):
            raise UserError(f"{_cache(recipe)} was made with other weights of {recipe.all_teachers[name].path} (sha256 "
                            f"{str(one.network['file'])[:12]}, now {now[:12]}); make another one")
    _refuse(recipe, facts.inputs, {"view": _view(recipe), "data": _data(recipe, splits), "precision": recipe.run.precision}, "")
    views, val = facts.splits["train"].views, facts.splits["val"].positions
    if (recipe.view.count or 1) > views:
        raise UserError(f"view.count={recipe.view.count}: {_cache(recipe)} has {views} views; leave it out, or take fewer")
    if missing := set(evenly(len(splits.val), recipe.evaluate.images)) - set(val):
        raise UserError(f"evaluate.images={recipe.evaluate.images}: {_cache(recipe)} has {len(val)} held-out images, and "
                        f"lacks {len(missing)} of these")
    count = recipe.view.count or views
    if recipe.run.epochs is not None and recipe.run.epochs > count:
        say(f"  targets.cached: {recipe.run.epochs} epochs take turns with {count} views of each image")
    return store


def _cache(recipe: StageRecipe) -> str:
    return f"targets.cached={recipe.targets.cached}"


def _refuse(recipe: StageRecipe, found: dict[str, Any], wanted: dict[str, Any], prefix: str) -> None:
    if changed := differences(found, wanted, f"{prefix}." if prefix else ""):
        raise UserError(f"{_cache(recipe)} has other targets (cache -> recipe): {few(changed, 5)}"
                        + ("; view.seed is run.seed unless it is set" if any("view.seed" in line for line in changed) else ""))


def _settings(recipe: StageRecipe, name: str, *, in_file: bool) -> dict[str, Any]:
    """Returns the settings of a teacher that its features depend on; of weights in a file (`in_file`) not the place."""
    settings = recipe.all_teachers[name]
    place = {"name"} if settings.kind == "stage" else {"weights"}
    return settings.model_dump(mode="json", exclude={"weight", *(place if in_file else ())})


def _file_hash(recipe: StageRecipe, name: str) -> str | None:
    """Returns the SHA-256 of a teacher's weights in a local file or folder; None if they are in none, or not here."""
    settings = recipe.all_teachers[name]
    place = settings.name if settings.kind == "stage" else settings.weights
    return content_hash(place) if place is not None and Path(place).exists() else None


def _view(recipe: StageRecipe) -> dict[str, Any]:
    """Returns the settings of the views, with their seed."""
    seed = recipe.run.seed if recipe.view.seed is None else recipe.view.seed
    kept: dict[str, Any] = recipe.view.model_dump(mode="json", exclude={"count", "seed"})
    return kept | {"seed": seed}


def _data(recipe: StageRecipe, splits: Splits) -> dict[str, Any]:
    """Returns what decides the images and their pixels, in JSON's types."""
    pixels = [[part.channels, part.window and list(part.window), part.exif] for part in recipe.data.sources.values()]
    return splits.facts() | {"records": pixels}
