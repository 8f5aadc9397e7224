"""Fine-tuning a classifier: the broad stage (ImageNet-21k in EVA's pipeline) and the target stage (ImageNet-1k).

Expect a seeded trunk to be far ahead of one from scratch after the first epoch; if it is not, look at the key report.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import model_validator

from eva_mim.core.distributed import world_size
from eva_mim.data.view_settings import ViewSettings
from eva_mim.run.program import Stage, leave
from eva_mim.run.recipe import Recipe
from eva_mim.students import ClassifierSettings
from eva_mim.tasks import MixSettings

if TYPE_CHECKING:
    import torch

    from eva_mim.data.splits import Splits
    from eva_mim.run.loop import Parts
    from eva_mim.run.stage import Built, Networks
    from eva_mim.students.classifier import Classifier


R = TypeVar("R", bound="StageRecipe")
C = TypeVar("C", bound="Classifier")


class StageRecipe(Recipe):
    """Settings of a classification stage."""

    student: ClassifierSettings
    mix: MixSettings = MixSettings()
    view: ViewSettings = ViewSettings()

    @model_validator(mode="after")
    def _rows_have_a_parent(self) -> StageRecipe:
        if self.student.head_rows != "new" and self.init_from is None:
            raise ValueError(f"student.head_rows={self.student.head_rows} needs init_from, a checkpoint with a head")
        return self

    @model_validator(mode="after")
    def _mixing_takes_pairs(self) -> StageRecipe:
        micro = self.run.micro_batch or self.run.global_batch // world_size()
        for name in ("mixup", "cutmix"):
            if (value := getattr(self.mix, name)) and micro % 2:
                source = "run.micro_batch" if self.run.micro_batch else f"run.global_batch={self.run.global_batch} / processes"
                raise ValueError(f"mix.{name}={value} mixes the images of a micro-batch in pairs, and {source} is {micro}; set "
                                 f"run.micro_batch to an even number, or mix.{name}=0")
        return self

    @model_validator(mode="after")
    def _classes_keep_their_names(self) -> StageRecipe:
        for part in (self.data, *(self.data.mixture or ())):
            if part.class_names is not None:
                raise ValueError(f"data.class_names={part.class_names} is for captions; a head is known by the dataset's own "
                                 "class names (synset ids), so leave it out")
        return self


def networks(recipe: StageRecipe, classes: int | None = None, *, weights: bool = True) -> Networks:
    """Returns the classifier with `classes` outputs; 1,000 if the number of classes is not known."""
    from eva_mim.run.stage import Networks
    from eva_mim.students.classifier import Classifier

    return Networks(Classifier(recipe.student, classes or 1000))


def build(recipe: StageRecipe, device: torch.device) -> Built:
    """Returns classifier, data and evaluator of a recipe."""
    return build_classifier(recipe, device, networks, image_parts)


def image_parts(recipe: StageRecipe, student: Classifier, splits: Splits, device: torch.device) -> Parts:
    """Returns task, data and evaluator of a classifier that is trained on images."""
    from eva_mim.data.preparation import LabelledPreparation
    from eva_mim.data.views import EvalView, TrainView
    from eva_mim.evaluate.labels import ClassifierEvaluator
    from eva_mim.run.loaders import eval_loader, train_loader
    from eva_mim.run.loop import Parts
    from eva_mim.tasks.labels import Labels

    classes, sizes = len(splits.train.classes or ()), [student.image_size]
    view = TrainView(recipe.view, sizes, pixels=(student.mean, student.std))
    train = train_loader(recipe, splits.train, view, LabelledPreparation)
    val = eval_loader(recipe, splits.val, EvalView(sizes, recipe.view.crop_pct), LabelledPreparation)
    evaluator = ClassifierEvaluator(val, device)
    return Parts(Labels(student, classes, recipe.mix), train, evaluator, recipe.data.max_broken)


def build_classifier(
    recipe: R, device: torch.device, networks_of: Callable[[R, int], Networks],
    parts_of: Callable[[R, C, Splits, torch.device], Parts],
) -> Built:
    """Returns classifier, data and evaluator of a recipe, with the networks of `networks_of` and the parts of `parts_of` (those
    of a classifier or of a linear probe). Raises UserError if the data has no labels, or held-out data has other classes."""
    from eva_mim.core.errors import UserError
    from eva_mim.data.class_lists import describe
    from eva_mim.data.sources.folder import single_folder
    from eva_mim.data.splits import open_splits
    from eva_mim.run.loaders import seed_from
    from eva_mim.run.stage import Built
    from eva_mim.weights.export import grid_of, write_timm
    from eva_mim.weights.handover import read_parent
    from eva_mim.weights.head_rows import seed_head

    splits = open_splits(recipe.data)
    classes = splits.train.classes
    if classes is None:
        raise UserError(f"data.root: {recipe.data.root} has no labels (class folders; data.classes for shards; "
                        f"data.columns.label for a list){single_folder(recipe.data)}")
    if without := splits.without_labels():
        raise UserError(f"data: {'; '.join(without)}; a classifier needs one for each (KEY.cls in a shard), or leave the records "
                        "out with data.quarantine")
    if splits.val.classes != classes:
        raise UserError(f"data.held_out: its classes ({describe(splits.val.classes or ())}) are not those of the training images "
                        f"({describe(classes)})")
    student: C = networks_of(recipe, len(classes)).student

    def export(out: Path, weights: dict[str, torch.Tensor]) -> None:
        pool = recipe.student.global_pool
        write_timm(out, student.trunk, recipe.student, student.timm_weights(weights), classes=classes, global_pool=pool,
                   crop_pct=recipe.view.crop_pct)

    seeded = seed_from(recipe, student.trunk, classes)
    if seeded is not None and recipe.init_from is not None and recipe.student.head_rows != "new":
        seed_head(student.trunk, read_parent(recipe.init_from, recipe.hand_over), recipe.student, classes, seeded)
    return Built(
        parts_of(recipe, student, splits, device),
        export,
        splits.facts(),
        classes=classes,
        grid=grid_of(student.trunk),
        seeded=seeded,
    )


STAGE = Stage("classify", StageRecipe, networks, build)
main = STAGE.main


if __name__ == "__main__":
    leave(main())
