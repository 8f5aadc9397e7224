"""Functions of a recipe that several programs use: loaders, and the seeding of a trunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from eva_mim.core.batches import B
from eva_mim.core.contracts import Source
from eva_mim.core.distributed import rank, world_size
from eva_mim.core.log import say
from eva_mim.core.report import KeyReport
from eva_mim.data.dense_views import DenseEvalView, DenseTrainView
from eva_mim.data.loader import EvalLoader, TrainLoader
from eva_mim.data.preparation import Preparation
from eva_mim.data.sampler import GroupBatch
from eva_mim.data.subset import order_of
from eva_mim.data.video_views import VideoEvalView, VideoTrainView
from eva_mim.data.views import EvalView, TrainView
from eva_mim.engine import RunSettings
from eva_mim.run.recipe import Recipe
from eva_mim.trunks.facts import mean_std
from eva_mim.weights.handover import read_parent, seed_trunk


def batch_cut(run: RunSettings) -> dict[str, Any]:
    """Returns the arguments of `GlobalOrder` that cut the order of samples into this rank's micro-batches."""
    return {"seed": run.seed, "global_batch": run.global_batch, "micro_batch": run.micro_batch, "rank": rank(),
            "world": world_size()}


def train_loader(
    recipe: Recipe, source: Source, view: TrainView | DenseTrainView | VideoTrainView, kind: Callable[..., Preparation[B]],
    groups: Sequence[GroupBatch] = (),
) -> TrainLoader[B]:
    """Returns the loader of this rank's training batches, which the preparation `kind` makes from views; `groups` cut a step, if
    there are any. Raises UserError if a batch cannot be divided among the processes, or is larger than the data."""
    order = order_of(source, **batch_cut(recipe.run), groups=groups)
    made = kind(view, recipe.run.seed, view_seed=view.settings.seed, views=view.settings.count)
    return TrainLoader(source, made, order, recipe.data.workers)


def eval_loader(
    recipe: Recipe, source: Source, view: EvalView | DenseEvalView | VideoEvalView, kind: Callable[..., Preparation[B]],
    limit: int | None = None,
) -> EvalLoader[B]:
    """Returns the loader of this rank's held-out batches, with fixed views and masks (the same for every run seed). `limit`:
    largest number of images, spread evenly over the source; None for all."""
    made = kind(view, 0, training=False)
    return EvalLoader(source, made, eval_batch(recipe), recipe.data.workers, limit)


def eval_batch(recipe: Recipe) -> int:
    """Returns the number of images in a held-out batch of one process."""
    return min(250, recipe.run.micro_batch or recipe.run.global_batch)


def seed_from(recipe: Recipe, trunk: nn.Module, classes: tuple[str, ...] | None = None) -> KeyReport | None:
    """Seeds a trunk in place from `init_from`; returns a report of its tensors, None without `init_from`. Raises UserError.

    Prints a warning if the parent was trained with another mean or std, since the weights fit regardless.
    """
    if recipe.init_from is None:
        return None
    parent = read_parent(recipe.init_from, recipe.hand_over)
    for name, here, there in zip(("mean", "std"), mean_std(trunk, recipe.student), parent.pixels, strict=True):
        if there is not None and len(here) == len(there) and any(abs(a - b) > 1e-3 for a, b in zip(here, there, strict=True)):
            say(f"  warning: images are normalised with {name} {list(here)}, but {parent.path} was trained with {list(there)}; "
                f"unless you mean it, set student.{name} to that")
    return seed_trunk(trunk, parent, recipe.hand_over, classes)
