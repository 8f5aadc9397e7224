"""Accuracy of a finished classifier on the test sets of `imagenet.py`: exact counts over all ranks, in total and by class."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from eva_mim.core.batches import LabelledBatch
from eva_mim.core.distributed import all_reduce_sum
from eva_mim.core.errors import UserError
from eva_mim.core.run_folder import TIMM_CONFIG, WEIGHTS
from eva_mim.data.class_lists import layouts_with, read_classes
from eva_mim.data.loader import EvalLoader
from eva_mim.data.preparation import LabelledPreparation
from eva_mim.data.views import EvalView
from eva_mim.engine.step import autocast
from eva_mim.evaluate.counts import hits
from eva_mim.evaluate.imagenet import Variant, columns, without_border
from eva_mim.trunks.config import RESIZING
from eva_mim.trunks.create import create
from eva_mim.trunks.kernels import tune
from eva_mim.trunks.pixels import normalise
from eva_mim.weights.files.sidecar import Description, at, batch_of, describe


class FolderClassifier(nn.Module):
    """Classifier that timm opens from a folder: a stage's result, its `ema`, or the output of `eva-mim convert --to hf`. Raises
    UserError for a folder that is no such classifier, or one for other than RGB images."""

    def __init__(self, folder: Path, classes: str | None = None):
        super().__init__()
        found = describe(folder)
        if found.architecture is None or not (folder / WEIGHTS).is_file():
            raise UserError(f"{folder} is no classifier that timm opens (config.json, {WEIGHTS}); a finished stage is one, its "
                            "ema, and what eva-mim convert --to hf writes")
        try:
            self.trunk: Any = create(f"local-dir:{folder}", pretrained=True).eval()
        except (RuntimeError, TypeError, ValueError, KeyError) as error:
            raise UserError(f"{folder}: timm cannot open it: {error}") from None
        config = self.trunk.pretrained_cfg
        if config["input_size"][0] != 3:
            raise UserError(f"{folder}: it is for images of {config['input_size'][0]} channels; these test sets are RGB")
        self.image_size = int(config["input_size"][-1])
        self.resizing = {key: config.get(key) or value for key, value in RESIZING.items()}
        self.mean, self.std = tuple(config["mean"]), tuple(config["std"])
        self.classes = _classes(folder, found, self.trunk.num_classes, classes)
        self.batch = batch_of(found)

    def forward(self, images: Tensor) -> Tensor:
        """Returns [B, K] logits of [B, 3, H, W] uint8 images."""
        logits: Tensor = self.trunk(normalise(images, self.mean, self.std))
        return logits


def _classes(folder: Path, found: Description, outputs: int, told: str | None) -> tuple[str, ...]:
    recorded = at(found.config, "label_names")
    if not recorded and told is None:
        raise UserError(f"{folder} does not name the classes of its {outputs} outputs; say them with --classes "
                        f"{' or '.join(layouts_with(outputs)) or 'FILE'}")
    classes = read_classes(folder / TIMM_CONFIG) if recorded else read_classes(str(told))
    if len(classes) != outputs:
        whose = "its class list" if recorded else f"--classes {told}"
        raise UserError(f"{folder} has {outputs} outputs, but {whose} has {len(classes)} classes")
    return classes


@dataclass(frozen=True)
class Accuracy:
    """Accuracy on one test set."""

    name: str
    classes: tuple[str, ...]
    images: int
    right: int
    right5: int
    by_class: list[list[int]]
    """For each class: number of images for which it is a correct answer, and how many of them are correct at top-1 and at
    top-5."""
    left_out: int

    @property
    def top1(self) -> float:
        """Top-1 accuracy in percent."""
        return 100 * self.right / self.images

    @property
    def top5(self) -> float:
        """Top-5 accuracy in percent."""
        return 100 * self.right5 / self.images


@torch.inference_mode()
def count(
    variant: Variant, model: Callable[[Tensor], Tensor], own: tuple[str, ...], batches: Iterable[LabelledBatch],
    device: torch.device, context: Callable[[], Any],
) -> Accuracy:
    """Returns the top-1 and top-5 accuracy over the competing classes. Every rank must call. Raises UserError if no image
    can be read.

    `own`: classes of the model's outputs; `context`: returns the context of a forward pass, which sets its precision.
    """
    chosen = torch.tensor(columns(variant, own), device=device)
    most = max(len(right) for right in variant.answers)
    padded = [right + (-1,) * (most - len(right)) for right in variant.answers]
    answers = torch.tensor(padded, device=device)
    totals = torch.zeros(3, dtype=torch.int64, device=device)
    by_class = torch.zeros(3, len(chosen), dtype=torch.int64, device=device)
    for batch in (batch.to(device) for batch in batches):
        with context():
            logits = model(batch.images).float()[:, chosen]
        right = answers[batch.labels]
        top1, top5 = hits(logits, right)
        for row, rows in enumerate((torch.ones_like(top1), top1, top5)):
            named = right[rows]
            totals[row] += rows.sum()
            by_class[row] += torch.bincount(named[named >= 0], minlength=len(chosen))
    images, first, five = (int(value) for value in all_reduce_sum(totals))
    if not images:
        raise UserError(f"{variant.name}: no image could be read")
    table: list[list[int]] = all_reduce_sum(by_class).T.tolist()
    return Accuracy(variant.name, variant.classes, images, first, five, table, variant.left_out)


class Classifies(Protocol):
    """Classifier with class names and its own image size and crop: `FolderClassifier`, `zeroshot.ZeroShot`."""

    classes: tuple[str, ...]
    image_size: int
    resizing: dict[str, Any]
    """Arguments of `EvalView` besides the size."""

    def to(self, device: torch.device) -> Any: ...


def measure(model: Classifies, variant: Variant, device: torch.device, *, precision: str, batch: int, workers: int) -> Accuracy:
    """Returns the model's accuracy on a test set, at its own image size. Every rank must call. Raises UserError if no image can
    be read."""
    tune(model, device)  # type: ignore[arg-type]
    view = partial(without_border, variant.border, EvalView([model.image_size], **model.resizing))
    loader = EvalLoader(variant.source, LabelledPreparation(view, 0, training=False), batch, workers)
    return count(variant, model.to(device), model.classes, loader, device, lambda: autocast(device, precision))


def as_table(found: Sequence[Accuracy]) -> str:
    """Returns a table with a line for each test set; for several also the mean of their top-1 accuracies, and how far it is below
    the top-1 accuracy of `val` (EVA's measure of robustness)."""
    lines = [f"{'set':<16} {'images':>8} {'top-1':>8} {'top-5':>8} {'classes':>8}"]
    for one in found:
        left = f"  {one.left_out} images without an answer left out" if one.left_out else ""
        lines.append(f"{one.name:<16} {one.images:>8} {one.top1:>8.3f} {one.top5:>8.3f} {len(one.classes):>8}{left}")
    if len(found) > 1:
        average = sum(one.top1 for one in found) / len(found)
        lines.append(f"{'average':<16} {'':>8} {average:>8.3f}   of these {len(found)} sets")
        lines += [f"{'gap':<16} {'':>8} {one.top1 - average:>8.3f}   val - average" for one in found if one.name == "val"]
    return "\n".join(lines) + "\n"


def as_csv(found: Sequence[Accuracy]) -> str:
    """Returns CSV with a line for each class of each test set: number of images for which it is a correct answer, and their top-1
    and top-5 accuracy in percent."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["set", "class", "images", "top1", "top5"])
    for one in found:
        for name, (images, first, five) in zip(one.classes, one.by_class, strict=True):
            shares = [f"{100 * value / images:.3f}" for value in (first, five)] if images else ["", ""]
            writer.writerow([one.name, name, images, *shares])
    return out.getvalue()
