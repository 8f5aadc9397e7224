"""Data of a linear probe: images or their features, some of which are set aside for the choice of a layer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from eva_mim.core.contracts import FeatureBatch, LabelledBatch, Source, TrainData
from eva_mim.core.distributed import all_reduce_sum, rank, world_size
from eva_mim.core.errors import UserError
from eva_mim.core.files import sha256
from eva_mim.core.log import say
from eva_mim.core.rng import derive
from eva_mim.data import too_many
from eva_mim.data.feature_store import EvalRows, Positions, RowLoader, Rows, cached_features
from eva_mim.data.preparation import LabelledPreparation
from eva_mim.data.sampler import GlobalOrder
from eva_mim.data.splits import HOLD_OUT_SEED, Splits
from eva_mim.data.subset import Subset
from eva_mim.evaluate.features import ridge_accuracy
from eva_mim.evaluate.probe import ProbeEvaluator
from eva_mim.run.loaders import batch_cut, eval_loader, train_loader
from eva_mim.run.loop import Parts
from eva_mim.students.classifier import LinearProbe
from eva_mim.tasks.probe import ProbeTask
from eva_mim.trunks.kernels import tune

if TYPE_CHECKING:
    from finetune.probe import StageRecipe


def probe_parts(recipe: StageRecipe, student: LinearProbe, splits: Splits, device: torch.device) -> Parts:
    """Returns task, data and evaluator of a probe. Raises UserError."""
    names = [f"lr{lr:g}" for lr in recipe.lrs]
    fixed: dict[str, float] = {}
    train: TrainData
    val: Iterable[LabelledBatch] | Iterable[FeatureBatch]
    select: Iterable[LabelledBatch] | Iterable[FeatureBatch]
    if recipe.probe.cached:
        train, val, select, fixed = _from_features(recipe, student, splits, device)
    else:
        sizes, source = [student.image_size], splits.train
        val, select = eval_loader(recipe, splits.val, sizes, recipe.view, LabelledPreparation), ()
        if len(names) > 1:
            kept, aside = set_aside(len(source), recipe.probe.select)
            select = eval_loader(recipe, Subset(source, aside), sizes, recipe.view, LabelledPreparation)
            source = Subset(source, kept)
        train = train_loader(recipe, source, sizes, recipe.view, LabelledPreparation, pixels=(student.mean, student.std))
    evaluator = ProbeEvaluator(val, select, names, fixed=fixed, device=device)
    return Parts(ProbeTask(student, names, recipe.mix.smoothing), train, evaluator, recipe.data.max_broken)


def set_aside(images: int, share: float) -> tuple[Positions, Positions]:
    """Returns the positions of images for training, and of those for the choice of the best layer: sorted, the same for every run
    seed. Raises UserError if no image is left for training."""
    shuffled = np.random.default_rng(derive(HOLD_OUT_SEED, "select")).permutation(images)
    count = max(world_size(), round(share * images))
    if count >= images:
        raise UserError(f"probe.select={share}: of {images} training images none would be left to learn from")
    return np.sort(shuffled[count:]), np.sort(shuffled[:count])


def _from_features(
    recipe: StageRecipe, student: LinearProbe, splits: Splits, device: torch.device
) -> tuple[RowLoader, EvalRows, EvalRows, dict[str, float]]:
    """Returns training rows, held-out rows, rows for the choice of a layer, and the figure of the ridge probe by its name. Raises
    UserError if too many images are broken."""
    train, val = (_features(recipe, student, source, device) for source in splits)
    missing = len(splits.train) - len(train.places)
    if too_many(missing, len(splits.train), recipe.data.max_broken):
        raise UserError(f"{missing} of {len(splits.train)} training images are broken, more than data.max_broken="
                        f"{recipe.data.max_broken:.2%}")
    every = np.arange(len(train.places))
    kept, aside = set_aside(len(every), recipe.probe.select) if len(recipe.lrs) > 1 else (every, every[:0])
    order = GlobalOrder(len(kept), **batch_cut(recipe.run))
    ridge = _ridge(train, val, len(splits.train.classes or ()), device)
    say(f"  ridge probe, in closed form: ridge_top1 {ridge:.4g}")
    loader = RowLoader(train, kept, order, splits.train.key)
    return loader, EvalRows(val, np.arange(len(val.places))), EvalRows(train, aside), {"ridge_top1": ridge}


def _features(recipe: StageRecipe, student: LinearProbe, source: Source, device: torch.device) -> Rows:
    """Returns the features of all images of a source, with the held-out view."""
    student.to(device).eval()
    tune(student, device)
    roots = [part.root for part in (recipe.data, recipe.data.held_out) if part is not None and part.root is not None]
    facts = {
        "weights": student.fingerprint(),
        "images": source.fingerprint,
        "quarantine": None if recipe.data.quarantine is None else sha256(recipe.data.quarantine),
        # Two folders may have files of the same names.
        "roots": [str(Path(root).resolve()) for root in roots],
        "pixels": [part.pixels for part in recipe.data.sources.values()],
        "student": recipe.student.model_dump(
            mode="json", include={"name", "image_size", "patch_size", "global_pool", "mean", "std"}
        ),
        "crop_pct": recipe.view.crop_pct,
        "device": device.type,
    }

    def features(images: Tensor) -> Tensor:
        return student.features(images)  # in fp32, as in whoever measures the exported classifier

    batches = eval_loader(recipe, source, [student.image_size], recipe.view, LabelledPreparation)
    return cached_features(facts, batches, features, len(source), device)


def _ridge(train: Rows, val: Rows, classes: int, device: torch.device) -> float:
    """Returns the held-out accuracy of a ridge probe; each rank computes with its share of the rows."""
    train, val = (Rows(*(part[rank() :: world_size()] for part in rows)) for rows in (train, val))
    return ridge_accuracy(
        val.features, val.labels, train.features, train.labels, classes=classes, device=device, total=all_reduce_sum
    )
