"""Masked feature pretraining: a student learns to predict a frozen teacher's features of masked patches.

Expect the held-out cosine to rise above `cosine_of_mean` within the first epoch; if it does not, the teacher's features are
(nearly) constant over patches, or the student gets no information about the images.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from eva_mim.core.errors import UserError
from eva_mim.run.program import Stage, leave
from pretrain.mim_recipe import StageRecipe

if TYPE_CHECKING:
    import torch

    from eva_mim.core.contracts import Teacher
    from eva_mim.data.splits import Splits
    from eva_mim.evaluate.patches import PatchProbe
    from eva_mim.run.stage import Built, Networks
    from eva_mim.targets import Targets
    from pretrain.targets import Wanted


def targets_of(recipe: StageRecipe) -> Wanted:
    """Returns what the stage wants of a store of targets."""
    from pretrain.lessons import sized_teachers
    from pretrain.targets import Wanted

    return Wanted(recipe, sized_teachers(recipe), "targets.cached", recipe.targets.cached, recipe.evaluate.images, patches=True,
                  mask=recipe.mask)


def networks(recipe: StageRecipe, classes: int | None = None, *, weights: bool = True) -> Networks:
    """Returns the student, with a head for each teacher, and the teachers. Raises UserError if their patch grids differ."""
    from eva_mim.run.stage import Networks
    from eva_mim.students.initialise import initialise
    from eva_mim.students.masked import MaskedStudent
    from pretrain.lessons import check_sizes, plan_of
    from pretrain.targets import stored_teachers

    wanted = targets_of(recipe)
    teachers: dict[str, Teacher] = {}
    teachers |= wanted.teacher_networks(weights=weights) if wanted.folder is None else stored_teachers(wanted)
    plans = {name: plan_of(recipe, name, teacher) for name, teacher in teachers.items()}
    alone = recipe.teacher is not None and not plans["teacher"].summary
    sizes = {side for group in recipe.groups.values() for side in group.sizes or ()}
    student = MaskedStudent(recipe.student, plans["teacher"].spatial if alone else plans, recipe.mask, sizes)
    initialise(student, recipe.student.init)
    check_sizes(recipe, student, teachers)
    return Networks(student, teachers)


def build(recipe: StageRecipe, device: torch.device) -> Built:
    """Returns networks, data and evaluator of a recipe."""
    from functools import partial

    from eva_mim.data.preparation import LabelledPreparation, MaskedPreparation, TeacherDrop
    from eva_mim.data.splits import open_splits
    from eva_mim.data.views import EvalView, TrainView
    from eva_mim.evaluate.masked import MaskedFeatureEvaluator
    from eva_mim.run.loaders import eval_loader, train_loader
    from eva_mim.run.loop import Parts
    from eva_mim.run.stage import Built
    from eva_mim.targets.cached import CachedTargets
    from eva_mim.targets.live import LiveTargets
    from eva_mim.tasks.masked import MaskedFeatures
    from eva_mim.weights.export import grid_of
    from pretrain import lessons as taught
    from pretrain.targets import open_store, view_of

    splits = open_splits(recipe.data)
    store = open_store(targets_of(recipe), splits)
    drawn = view_of(recipe, store)
    if recipe.mask.replay and drawn.count is None:
        raise UserError("mask.replay=true has no effect while each epoch has new views; set view.count, or targets.cached")
    made = networks(recipe)
    taught.check_mosaics(recipe, made)
    student, teachers = made.student, {name: teacher.to(device) for name, teacher in made.teachers.items()}
    lessons = taught.lessons_of(recipe, teachers, device)
    live = LiveTargets(teachers, partial(taught.side_seen, recipe, student, teachers))
    targets: Targets = CachedTargets(store, made.teachers) if store else live
    task = MaskedFeatures(student, targets, lessons)
    heads = taught.start_heads(recipe, student, teachers)
    masked = {split: partial(
        MaskedPreparation, predict_visible=any(lesson.visible for lesson in lessons.values()),
        with_views=("view", "mask") if recipe.mask.replay else ("view",),
        stored=partial(store.row, split, networks=set(teachers)) if store else None,
        drop=TeacherDrop(recipe.teacher_drop, len(teachers)) if recipe.teacher_drop else None,
    ) for split in ("train", "val")}
    parts = taught.shown_by_group(recipe, student, teachers if store is None else {})
    sizes = [size for part in parts for shown in part for size in shown.sizes]
    labelled = _labelled(splits)
    prompts = taught.class_vectors(recipe, splits.val.classes if labelled else None, device)
    crop_pct = recipe.view.crop_pct
    held_out = [eval_loader(recipe, splits.val, EvalView(part[0].sizes, crop_pct), partial(masked["val"], groups=[part[:1]]),
                            recipe.evaluate.images) for part in parts]
    evaluator = MaskedFeatureEvaluator(
        task,
        held_out,
        eval_loader(recipe, splits.train, EvalView([parts[0][0].side], crop_pct), LabelledPreparation, recipe.evaluate.bank),
        labelled=labelled,
        device=device,
        prompts=prompts,
        probe=_probe(recipe, student.image_size, device),
    )

    view = TrainView(drawn, sizes)
    train = train_loader(recipe, splits.train, view, partial(masked["train"], groups=parts), recipe.group_batches)
    return Built(
        Parts(task, train, evaluator, recipe.data.max_broken),
        partial(taught.export, recipe, made, lessons, prompts),
        splits.facts(),
        splits.val.classes if prompts else None,
        grid=grid_of(student.trunk),
        seeded=taught.seed_student(recipe, student),
        teachers=teachers,
        begin=partial(taught.measured_and_unfolded, task, heads, train, device) if heads else None,
    )


def _probe(recipe: StageRecipe, side: int, device: torch.device) -> PatchProbe | None:
    """Returns the segmentation probe of the recipe; None for none."""
    data = recipe.evaluate.segmentation
    if data is None:
        return None
    from eva_mim.data.dense_views import DenseEvalView
    from eva_mim.data.preparation import WholePreparation
    from eva_mim.data.sources.masks import segment_names
    from eva_mim.data.splits import open_splits
    from eva_mim.evaluate.patches import PatchProbe
    from eva_mim.run.loaders import eval_loader

    names, view = segment_names(data), DenseEvalView(side, square=True)
    bank, val = (eval_loader(recipe, source, view, WholePreparation) for source in open_splits(data))
    return PatchProbe(bank, val, len(names), device)


def _labelled(splits: Splits) -> bool:
    """Returns whether all images have labels of the same classes; says which have none."""
    if splits.val.classes is None or splits.val.classes != splits.train.classes:
        return False
    from eva_mim.core.log import say

    if without := splits.without_labels():
        say(f"  {'; '.join(without)}: no k-NN and ridge figures")
    return not without


STAGE = Stage("mim", StageRecipe, networks, build)
main = STAGE.main


if __name__ == "__main__":
    leave(main())
