"""Views, masks and captions come from random streams of their own: none depends on what another one drew."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import torch

from eva_mim.core.batches import MaskedBatch
from eva_mim.core.contracts import Sample
from eva_mim.core.rng import derive
from eva_mim.core.settings import parse
from eva_mim.data.loader import EvalLoader, TrainLoader
from eva_mim.data.masking import make_mask
from eva_mim.data.preparation import ImageTextPreparation, MaskedPreparation
from eva_mim.data.sampler import GlobalOrder, Place
from eva_mim.data.source_settings import SceneSettings
from eva_mim.data.sources.scenes import SceneSource
from eva_mim.data.view_settings import MaskSettings, ViewSettings
from eva_mim.data.views import EvalView, TrainView
from pretrain import mim, mim_recipe
from tests.tiny import MIM

SIZES = [16, 24]
IMAGES, EPOCHS = 8, 4
SOURCE = SceneSource(SceneSettings(size=32, train=IMAGES, val=IMAGES), "train")
Row = tuple[dict[int, torch.Tensor], torch.Tensor]
"""Views by side, mask."""


def masked(mask: dict[str, Any], views: int | None = None, sizes: list[int] = SIZES, **view: Any) -> MaskedPreparation:
    """Training views with masks of a 4 x 4 grid."""
    return MaskedPreparation(TrainView(ViewSettings(**view), sizes), 7, make_mask((4, 4), MaskSettings(**mask)), views=views)


def rows_of(batches: Iterable[MaskedBatch]) -> dict[int, Row]:
    """Index -> its row."""
    found = {}
    for batch in batches:
        assert batch.masked is not None
        for row, index in enumerate(batch.index.tolist()):
            found[index] = {side: images[row] for side, images in batch.views.items()}, batch.masked[row]
    return found


def by_epoch(made: MaskedPreparation) -> list[dict[int, Row]]:
    """The rows of each epoch."""
    loader = TrainLoader(SOURCE, made, GlobalOrder(IMAGES, seed=3, global_batch=IMAGES, micro_batch=IMAGES // 2), 0)
    return [rows_of(step) for step in loader.steps(0, EPOCHS)]


def views_equal(one: Row, other: Row) -> bool:
    """Every size, byte for byte."""
    return one[0].keys() == other[0].keys() and all(torch.equal(one[0][side], other[0][side]) for side in one[0])


BLOCKS, SINGLE = {"ratio": 0.4}, {"kind": "random", "ratio": 0.75}


def test_another_mask_leaves_the_views_as_they_are() -> None:
    for ours, theirs in zip(by_epoch(masked(BLOCKS)), by_epoch(masked(SINGLE)), strict=True):
        assert all(views_equal(ours[index], theirs[index]) for index in range(IMAGES))
        assert not all(torch.equal(ours[index][1], theirs[index][1]) for index in range(IMAGES))


def test_masks_are_those_of_any_view() -> None:
    """A crop that seldom fits is drawn more often, augmentations draw as well, and sizes draw nothing."""
    expected = by_epoch(masked(BLOCKS))
    others = (
        masked(BLOCKS, crop_scale=(0.9, 1.0)),
        masked(BLOCKS, crop_scale=(0.05, 0.1), crop_ratio=(0.2, 5.0)),
        masked(BLOCKS, jitter=(0.4, 0.4, 0.4, 0.1), grayscale=0.5),
        masked(BLOCKS, sizes=[24]),
    )
    for made in others:
        for ours, theirs in zip(expected, by_epoch(made), strict=True):
            assert all(torch.equal(ours[index][1], theirs[index][1]) for index in range(IMAGES))
            assert not all(views_equal(ours[index], theirs[index]) for index in range(IMAGES))


def test_views_come_again_with_other_masks() -> None:
    """Of two views the first comes again in the third epoch; the masks are those of a run with a new view in each epoch."""
    fresh, again = by_epoch(masked(BLOCKS)), by_epoch(masked(BLOCKS, views=2))
    for index in range(IMAGES):
        for epoch in range(EPOCHS):
            assert views_equal(again[epoch][index], fresh[epoch % 2][index])
            assert torch.equal(again[epoch][index][1], fresh[epoch][index][1])
        assert not views_equal(fresh[0][index], fresh[2][index])
        assert not views_equal(fresh[0][index], fresh[1][index])
    assert sum(torch.equal(again[0][index][1], again[2][index][1]) for index in range(IMAGES)) < IMAGES // 2


def test_a_seed_of_their_own() -> None:
    """Runs of several seeds see the same views, with masks of their own."""
    view, mask = TrainView(ViewSettings(), SIZES), make_mask((4, 4), MaskSettings(**BLOCKS))
    first, second = (by_epoch(MaskedPreparation(view, seed, mask, view_seed=5)) for seed in (1, 2))
    for ours, theirs, usual in zip(first, second, by_epoch(MaskedPreparation(view, 5, mask)), strict=True):
        for index in range(IMAGES):
            assert views_equal(ours[index], theirs[index])
            assert views_equal(ours[index], usual[index])
        assert not all(torch.equal(ours[index][1], theirs[index][1]) for index in range(IMAGES))


def test_the_crop_of_a_size_does_not_depend_on_the_others() -> None:
    both, alone = by_epoch(masked(BLOCKS)), by_epoch(masked(BLOCKS, sizes=[24, 24]))
    for ours, theirs in zip(both, alone, strict=True):
        for index in range(IMAGES):
            assert list(theirs[index][0]) == [24]
            assert torch.equal(ours[index][0][24], theirs[index][0][24])


def test_a_caption_does_not_depend_on_the_view() -> None:
    """The same of five captions whatever the crop is; over eight images and four epochs not always the same one."""

    def said(**view: Any) -> list[int]:
        made = ImageTextPreparation(TrainView(ViewSettings(**view), [16]), 7, lambda texts: torch.tensor([[int(texts[0])]]))
        sample = Sample("x", SOURCE.read(0).image, None, tuple("01234"))
        places = [Place(epoch, index) for epoch in range(EPOCHS) for index in range(IMAGES)]
        return [int(made.content(sample, place, None)[1]) for place in places]

    assert said() == said(crop_scale=(0.9, 1.0)) == said(jitter=(0.4, 0.4, 0.4, 0.1))
    assert len(set(said())) > 2


def test_held_out_masks_are_of_no_training_run() -> None:
    """Though a run may have the held-out seed; and they are the same in every evaluation."""
    mask = make_mask((4, 4), MaskSettings())
    made = MaskedPreparation(EvalView(SIZES), 0, mask, training=False)
    first, again = (rows_of(EvalLoader(SOURCE, made, 4, 0)) for _ in range(2))
    assert all(views_equal(first[index], again[index]) for index in range(IMAGES))
    assert all(torch.equal(first[index][1], again[index][1]) for index in range(IMAGES))
    trained = MaskedPreparation(EvalView(SIZES), 0, mask)
    streams = {made.draws(purpose, 0, index).random() for made in (made, trained) for purpose in ("view", "mask", "caption")
               for index in range(IMAGES)}
    assert len(streams) == 2 * 3 * IMAGES


def test_streams_are_functions_of_seed_purpose_number_and_index() -> None:
    made = masked(BLOCKS)
    for purpose in ("view", "mask", "caption"):
        assert made.draws(purpose, 3, 11).random() == random.Random(derive(7, purpose, 3, 11)).random()


def test_a_recipe_says_how_many_views() -> None:
    """`view.count` and `view.seed`, in the loader of a stage."""
    tree = MIM | {"view": {"count": 2, "seed": 3}}
    recipes = [parse(mim_recipe.StageRecipe, tree | {"run": MIM["run"] | {"seed": seed}}, "r.yaml") for seed in (0, 1)]
    loaders = [mim.build(recipe, torch.device("cpu")).parts.train for recipe in recipes]
    ours, theirs = ([rows_of(batch for step in loader.steps(start, start + 4) for batch in step) for start in (0, 4, 8)]
                    for loader in loaders)
    for index in range(96):
        assert views_equal(ours[0][index], ours[2][index])
        assert not views_equal(ours[0][index], ours[1][index])
        assert views_equal(ours[1][index], theirs[1][index])
