"""Data of a linear probe: images or their features, some of which are set aside for the choice of a layer."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from eva_mim.core.batches import FeatureBatch, LabelledBatch
from eva_mim.core.contracts import Features, TrainData
from eva_mim.core.distributed import all_reduce_sum, world_size
from eva_mim.core.errors import UserError
from eva_mim.core.files import sha256
from eva_mim.core.log import say
from eva_mim.core.rng import derive
from eva_mim.core.settings import digest
from eva_mim.data import too_many
from eva_mim.data.preparation import LabelledPreparation, MaskedPreparation
from eva_mim.data.sampler import GlobalOrder
from eva_mim.data.sources.index import cache_folder
from eva_mim.data.splits import HOLD_OUT_SEED, Splits, pixels_of, roots_of
from eva_mim.data.store.files import FeatureStore, NetworkFacts, SplitFacts, StoreFacts
from eva_mim.data.store.rows import EvalRows, Positions, RowLoader, Rows
from eva_mim.data.store.write import Pair, store_of
from eva_mim.data.subset import Subset
from eva_mim.data.views import EvalView, TrainView
from eva_mim.evaluate.features import ridge_accuracy
from eva_mim.evaluate.probe import ProbeEvaluator
from eva_mim.run.loaders import batch_cut, eval_batch, eval_loader, train_loader
from eva_mim.run.loop import Parts
from eva_mim.students.classifier import LinearProbe
from eva_mim.tasks.probe import ProbeTask
from eva_mim.trunks.kernels import tune

if TYPE_CHECKING:
    from finetune.probe import StageRecipe

TRUNK = "trunk"
"""Name of the network in the store of its features."""


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
        view = EvalView(sizes, recipe.view.crop_pct)
        val, select = eval_loader(recipe, splits.val, view, LabelledPreparation), ()
        if len(names) > 1:
            kept, aside = set_aside(len(source), recipe.probe.select)
            select = eval_loader(recipe, Subset(source, aside), view, LabelledPreparation)
            source = Subset(source, kept)
        drawn = TrainView(recipe.view, sizes, pixels=(student.mean, student.std))
        train = train_loader(recipe, source, drawn, LabelledPreparation)
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


class _Trunk:
    """The frozen trunk of a probe, as a network of which summaries are stored."""

    def __init__(self, student: LinearProbe):
        self._student, self.image_size = student, student.image_size

    def __call__(self, images: Tensor) -> Features:
        """Returns the pooled features of [B, channels, S, S] uint8 images, in fp32 as in whoever measures the exported
        classifier."""
        summary = self._student.features(images)
        return Features(summary, summary.new_empty(len(summary), 0, 0), (0, 0))


def _from_features(
    recipe: StageRecipe, student: LinearProbe, splits: Splits, device: torch.device
) -> tuple[RowLoader, EvalRows, EvalRows, dict[str, float]]:
    """Returns training rows, held-out rows, rows for the choice of a layer, and the figure of the ridge probe by its name. Raises
    UserError if too many images are broken."""
    store = _stored(recipe, student, splits, device)
    train, val = (Rows.of(store, split, TRUNK) for split in ("train", "val"))
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


def _stored(recipe: StageRecipe, student: LinearProbe, splits: Splits, device: torch.device) -> FeatureStore:
    """Returns the features of all images with the held-out view: in the cache folder, under a hash of all that they depend on, so
    that its content is never stale. Unused folders stay until the user removes them."""
    student.to(device).eval()
    tune(student, device)
    inputs = {
        "images": [source.fingerprint for source in splits],
        "quarantine": None if recipe.data.quarantine is None else sha256(recipe.data.quarantine),
        "roots": roots_of(recipe.data),
        "pixels": pixels_of(recipe.data),
        "crop_pct": recipe.view.crop_pct,
        "device": device.type,
    }
    settings = recipe.student.model_dump(
        mode="json", include={"name", "image_size", "patch_size", "global_pool", "mean", "std"}
    )
    width: int = student.trunk.num_features  # type: ignore[assignment]
    trunk = NetworkFacts(patches=0, width=0, summary=width, network=settings | {"sha256": student.fingerprint()})
    facts = StoreFacts(networks={TRUNK: trunk}, inputs=inputs, labels=True,
                       splits={"train": SplitFacts(images=len(splits.train)), "val": SplitFacts(images=len(splits.val))})
    preparation = MaskedPreparation(EvalView([student.image_size], recipe.view.crop_pct), 0, training=False)
    store = store_of(
        cache_folder() / "features" / digest(facts.identity())[:24], facts,
        {"train": Pair(splits.train, preparation), "val": Pair(splits.val, preparation)}, {TRUNK: _Trunk(student)},
        batch=eval_batch(recipe), workers=recipe.data.workers, device=device, autocast=nullcontext, wait=True,
    )
    say(f"  features: {facts.rows()} images x {width}, {facts.bytes() / 1e9:.3g} GB in {store.folder}")
    return store


def _ridge(train: Rows, val: Rows, classes: int, device: torch.device) -> float:
    """Returns the held-out accuracy of a ridge probe; each rank computes with its share of the rows."""
    train, val = train.share(), val.share()
    return ridge_accuracy(
        val.features, val.labels, train.features, train.labels, classes=classes, device=device, total=all_reduce_sum
    )
