"""Maps of a timm trunk's blocks or stages, for dense tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from eva_mim.core.errors import UserError


class Level(NamedTuple):
    """A block or stage of a trunk."""

    width: int
    """Channels of its map."""
    stride: int
    """Pixels of the image's side in a cell of the map."""


def levels(trunk: Any) -> list[Level]:
    """Returns the blocks or stages of a trunk, in the order of their numbers for `maps_of`. Raises UserError for a trunk that
    does not give their maps."""
    if not hasattr(trunk, "forward_intermediates") or not getattr(trunk, "feature_info", None):
        raise UserError(f"student.name: {type(trunk).__name__} does not give the maps of its blocks; timm's ViTs, hybrids and "
                        "convolutional networks with forward_intermediates do")
    listed = [trunk.feature_info[place] for place in range(len(trunk.feature_info))]
    return [Level(one["num_chs"], one["reduction"]) for one in listed]


def maps_of(trunk: Any, images: Tensor, indices: Sequence[int], *, normed: bool) -> list[Tensor]:
    """Returns [B, D, h, w] maps of blocks or stages, in rising order, of normalised images. `normed`: after the last norm."""
    found: list[Tensor] = trunk.forward_intermediates(
        images, indices=sorted(indices), norm=normed, stop_early=True, output_fmt="NCHW", intermediates_only=True)
    return found


def pyramid(width: int, factor: float) -> nn.Module:
    """Returns layers from maps [B, width, h, w] to [B, width, factor h, factor w], for factors 4, 2, 1 and 1/2: BEiT's pyramid of
    a plain ViT, which EVA's segmentation uses."""
    if factor == 4:
        return nn.Sequential(nn.ConvTranspose2d(width, width, 2, 2), nn.BatchNorm2d(width), nn.GELU(),
                             nn.ConvTranspose2d(width, width, 2, 2))
    if factor == 2:
        return nn.ConvTranspose2d(width, width, 2, 2)
    return nn.MaxPool2d(2) if factor == 0.5 else nn.Identity()
