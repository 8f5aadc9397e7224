"""Held-out figures of a segmentation model: one confusion matrix over the set and all ranks."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from eva_mim.core.batches import WholeImages
from eva_mim.core.contracts import Autocast
from eva_mim.core.distributed import all_reduce_sum
from eva_mim.core.errors import UserError
from eva_mim.core.files import replacing, write_text
from eva_mim.evaluate.segmentation import Segmented, confusion, figures, slid
from eva_mim.evaluate.sheet import coloured, drawn_sheet
from eva_mim.students.segmenter import MAIN

SHOWN = 8
"""Images on the sheet of predictions."""
TABLE, SHEET = "segmentation.csv", "predictions.png"
"""Files of the last evaluation in a run's folder."""


class SegmentationEvaluator:
    """Evaluator of a segmentation model. The map of an image is that of the whole image, or the mean of windows of it."""

    headline = "miou"

    def __init__(
        self, val: Iterable[WholeImages], names: tuple[str, ...], device: torch.device, *, side: int, stride: float | None,
        most: int,
    ):
        """`side`: of windows, in pixels; `stride`: their distance as a share of it, None for whole images; `most`: windows at
        once."""
        self.val, self.names, self.device, self.side, self.stride, self.most = val, names, device, side, stride, most
        self.found: Segmented | None = None
        """Figures of the last evaluation."""
        self._pixels: list[int] = []
        self._shown: list[tuple[Image.Image, str]] = []

    def __call__(self, student: nn.Module, autocast: Autocast) -> dict[str, float]:
        """Returns `miou`, `pixel_accuracy` and `class_accuracy` in percent. Raises UserError if no pixel has a class."""
        count = len(self.names)
        matrix = torch.zeros(count, count, dtype=torch.int64, device=self.device)
        self._shown = []

        def map_of(windows: Tensor) -> Tensor:
            with autocast():
                scores: Tensor = student(windows)[MAIN]
            return scores

        for batch in (batch.to(self.device) for batch in self.val):
            whole = (map_of(image[None])[0] for image in batch.images)
            found = whole if self.stride is None else slid(batch.images, self.side, map_of, self.stride, self.most)
            for image, truth, scores in zip(batch.images, batch.segmentations, found, strict=True):
                said = F.interpolate(scores[None].float(), truth.shape, mode="bilinear")[0].argmax(0)
                matrix += confusion(truth, said, count)
                if len(self._shown) < 3 * SHOWN:
                    self._shown += _cells(image, truth, said, self.names)
        matrix = all_reduce_sum(matrix)
        if not matrix.any():
            raise UserError("no held-out pixel belongs to a class")
        self.found, self._pixels = figures(matrix), matrix.sum(1).tolist()
        return {"miou": self.found.miou, "pixel_accuracy": self.found.pixel_accuracy, "class_accuracy": self.found.class_accuracy}

    def report(self, out: Path, draw: Callable[[Image.Image], None]) -> None:
        """Writes the table of classes and the sheet of predictions; see `Parts.report`."""
        assert self.found is not None
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["class", "pixels", "iou", "accuracy"])
        for row in zip(self.names, self._pixels, self.found.ious, self.found.accuracies, strict=True):
            writer.writerow([*row[:2], *("" if math.isnan(value) else f"{value:.3f}" for value in row[2:])])
        write_text(out / TABLE, text.getvalue())
        sheet = drawn_sheet(self._shown, len(self._shown), 6)
        with replacing(out / SHEET) as temporary:
            sheet.save(temporary, "png")
        draw(sheet)


def _cells(image: Tensor, truth: Tensor, said: Tensor, names: tuple[str, ...]) -> list[tuple[Image.Image, str]]:
    """Returns image, truth and prediction, with the three largest classes of each."""
    channels = image if len(image) == 3 else image[:1].expand(3, -1, -1)
    picture = Image.fromarray(channels.permute(1, 2, 0).round().byte().cpu().numpy())
    maps = [(coloured(one.cpu().numpy()), f"{name}: {_largest(one, names)}") for name, one in (("truth", truth), ("said", said))]
    return [(picture, "image"), *maps]


def _largest(segmentation: Tensor, names: tuple[str, ...]) -> str:
    counts = torch.bincount(segmentation[segmentation >= 0].long(), minlength=len(names))
    return ", ".join(names[number] for number in counts.argsort(descending=True)[:3].tolist() if counts[number])
