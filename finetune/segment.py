"""Semantic segmentation: a trunk and a head, trained on images with segmentation maps.

Expect a seeded trunk with a linear head to be far ahead of one from scratch after the first epochs; if it is not, look at the
key report, and at predictions.png.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from eva_mim.core.settings import For, Settings
from eva_mim.data.view_settings import DenseViewSettings
from eva_mim.run.program import Stage, leave
from eva_mim.run.recipe import Recipe
from eva_mim.students import SegmenterSettings

if TYPE_CHECKING:

    import torch

    from eva_mim.run.stage import Built, Networks


class EvaluateSettings(Settings):
    """How held-out images are segmented; their short side becomes `student.image_size`."""

    images: Literal["windows", "whole"] = "windows"
    """"windows": square windows of `student.image_size`, whose scores are averaged. "whole": the image at once, with the trunk's
    positions interpolated."""
    stride: Annotated[float, Field(gt=0.0, le=1.0), For("images", "windows")] = 2 / 3
    """Distance of windows as a share of their side (mmsegmentation's 341 of 512 px; EVA-02)."""


class StageRecipe(Recipe):
    """Settings of a segmentation stage."""

    reads: ClassVar[str | None] = "segmentation"
    student: SegmenterSettings
    view: DenseViewSettings = DenseViewSettings()
    evaluate: EvaluateSettings = EvaluateSettings()

    @model_validator(mode="after")
    def _a_frozen_trunk_has_learned(self) -> StageRecipe:
        if self.student.frozen and self.init_from is None:
            raise ValueError("student.frozen=true needs init_from: a head on a trunk that has learned nothing says nothing")
        return self


def networks(recipe: StageRecipe, classes: int | None = None, *, weights: bool = True) -> Networks:
    """Returns the segmentation model with `classes` classes; 150 (ADE20K's) if the number of classes is not known."""
    from eva_mim.run.stage import Networks
    from eva_mim.students.segmenter import Segmenter

    return Networks(Segmenter(recipe.student, classes or 150, any_shape=recipe.evaluate.images == "whole"))


def build(recipe: StageRecipe, device: torch.device) -> Built:
    """Returns model, data and evaluator of a recipe. Raises UserError for data without maps."""
    from functools import partial

    from eva_mim.data.dense_views import DenseEvalView, DenseTrainView
    from eva_mim.data.preparation import SegmentedPreparation, WholePreparation
    from eva_mim.data.sources.masks import segment_names
    from eva_mim.data.splits import open_splits
    from eva_mim.evaluate.segment import SegmentationEvaluator
    from eva_mim.run.loaders import eval_batch, eval_loader, seed_from, train_loader
    from eva_mim.run.loop import Parts
    from eva_mim.run.stage import Built
    from eva_mim.tasks.segment import Segmentation
    from eva_mim.weights.export import grid_of
    from eva_mim.weights.segmenter import write_segmenter

    names = segment_names(recipe.data)
    splits = open_splits(recipe.data)
    student = networks(recipe, len(names)).student
    seeded = seed_from(recipe, student.trunk)
    side, whole = student.image_size, recipe.evaluate.images == "whole"
    train = train_loader(recipe, splits.train, DenseTrainView(recipe.view, side, student.mean), SegmentedPreparation)
    view = DenseEvalView(side, student.stride if whole else 1)
    evaluator = SegmentationEvaluator(
        eval_loader(recipe, splits.val, view, WholePreparation), names, device,
        side=side, stride=None if whole else recipe.evaluate.stride, most=eval_batch(recipe),
    )
    auxiliary = recipe.student.head.auxiliary if recipe.student.head.kind == "upernet" else 0.0
    return Built(
        Parts(Segmentation(student, auxiliary), train, evaluator, recipe.data.max_broken, evaluator.report),
        partial(write_segmenter, student=student, settings=recipe.student, names=names, stride=recipe.evaluate.stride),
        splits.facts(),
        classes=names,
        grid=grid_of(student.trunk),
        seeded=seeded,
    )


STAGE = Stage("segment", StageRecipe, networks, build)
main = STAGE.main


if __name__ == "__main__":
    leave(main())
