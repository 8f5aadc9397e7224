"""Export of a segmentation stage: the trunk for timm, the head beside it, and the whole as a program that plain torch runs."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eva_mim.core.files import write_json, write_text, write_weights
from eva_mim.core.run_folder import HEAD, SEGMENTATION
from eva_mim.students import SegmenterSettings
from eva_mim.students.segmenter import MAIN, Segmenter
from eva_mim.weights.export import part, unpooled, write_program, write_timm

SCRIPT = "segment_image.py"
"""File of this package that is copied into the folder."""


class PlainSegmenter(nn.Module):
    """A segmentation model from images in [0, 1] to scores at their size."""

    def __init__(self, segmenter: Segmenter):
        super().__init__()
        self.segmenter = segmenter

    def forward(self, image: Tensor) -> Tensor:
        """Returns [B, K, S, S] scores of [B, channels, S, S] float32 images in [0, 1]."""
        scores = self.segmenter(255 * image)[MAIN]
        return F.interpolate(scores.float(), image.shape[2:], mode="bilinear")


def write_segmenter(
    out: Path, weights: dict[str, Tensor], *, student: Segmenter, settings: SegmenterSettings, names: tuple[str, ...],
    stride: float,
) -> None:
    """Writes the files of a finished segmentation stage. `stride`: distance of windows as a share of their side."""
    write_timm(out, student.trunk, settings, part(weights, "trunk."), global_pool=unpooled(student.trunk))
    write_weights(out / HEAD, {name: value for name, value in weights.items() if not name.startswith("trunk.")})
    about: dict[str, Any] = {"classes": list(names), "image_size": student.image_size, "stride": stride,
                             "blocks": list(student.blocks), "head": settings.head.model_dump(mode="json")}
    write_json(out / SEGMENTATION, about)
    example = torch.zeros(2, len(student.mean), student.image_size, student.image_size)
    inside = {f"segmenter.{name}": value for name, value in weights.items()}
    write_program(out, PlainSegmenter(deepcopy(student)), inside, example)
    write_text(out / SCRIPT, Path(__file__).with_name(SCRIPT).read_text())
