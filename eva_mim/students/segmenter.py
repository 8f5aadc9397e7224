"""Segmentation models: a trunk and a head that gives each cell of a map a score for each class."""

from __future__ import annotations

from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from eva_mim.core.errors import UserError
from eva_mim.core.settings import few
from eva_mim.students import SegmentationHeadSettings, SegmenterSettings
from eva_mim.students.norms import with_global_norms
from eva_mim.trunks import facts
from eva_mim.trunks.create import build_trunk, has_tokens
from eva_mim.trunks.levels import Level, levels, maps_of, pyramid
from eva_mim.trunks.pixels import normalise

MAIN, AUXILIARY = "pixels", "auxiliary"
"""Names of the scores, and of their terms of the loss."""
INIT_STD = 0.01
"""Standard deviation of a classifier's first weights (mmsegmentation's decode heads)."""


class Segmenter(nn.Module):
    """A timm trunk, and a head on the maps of its blocks. Raises UserError for a trunk or blocks that do not fit the head."""

    def __init__(self, settings: SegmenterSettings, classes: int, *, any_shape: bool = False):
        """`any_shape`: it takes images of other sizes than its own, too, whose sides are whole numbers of patches."""
        super().__init__()
        options = {"global_pool": "", **({"dynamic_img_size": True} if any_shape else {})} if has_tokens(settings) else {}
        self.trunk: Any = build_trunk(settings, num_classes=0, **options)
        self.image_size = facts.image_size(self.trunk, settings)
        self.mean, self.std = facts.mean_std(self.trunk, settings)
        self.frozen = settings.frozen
        known, head = levels(self.trunk), settings.head
        self.blocks = _chosen(known, head)
        self.normed = head.kind == "linear" if head.normed is None else head.normed
        chosen = [known[index] for index in self.blocks]
        self.stride = max(level.stride for level in chosen)
        """Pixels of the image's side in a cell of the coarsest map: sides of images are whole numbers of it."""
        if self.image_size % self.stride:
            raise UserError(f"student.image_size={self.image_size} is no whole number of the {self.stride} px of a cell of "
                            f"{settings.name}'s maps")
        kind = LinearHead if head.kind == "linear" else UperNet
        self.head = with_global_norms(kind(chosen, classes, head))
        if self.frozen:
            self.trunk.requires_grad_(False)
        for name in _unused(self.trunk, self.blocks, (len(self.mean), self.image_size, self.image_size), normed=self.normed):
            self.trunk.get_parameter(name).requires_grad_(False)  # engines expect a gradient of each trained one

    def train(self, mode: bool = True) -> Segmenter:
        """Sets the mode; a frozen trunk stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.trunk.eval()
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Returns [B, K, h, w] scores of [B, channels, H, W] images (uint8, or 0 to 255) by their names: MAIN, and in training
        AUXILIARY, if there is such a head."""
        with torch.no_grad() if self.frozen else nullcontext():
            maps = maps_of(self.trunk, normalise(images, self.mean, self.std), self.blocks, normed=self.normed)
        scores: dict[str, Tensor] = self.head(maps)
        return scores


def _unused(trunk: nn.Module, blocks: tuple[int, ...], shape: tuple[int, ...], *, normed: bool) -> list[str]:
    """Returns the names of the parameters on which the maps of blocks do not depend; found on the meta device."""
    copy = deepcopy(trunk).to("meta").eval()
    maps = maps_of(copy, torch.zeros(1, *shape, device="meta"), blocks, normed=normed)
    trained = {name: parameter for name, parameter in copy.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad([one.sum() for one in maps], list(trained.values()), allow_unused=True) if trained else ()
    return [name for name, gradient in zip(trained, found, strict=True) if gradient is None]


def _chosen(known: list[Level], settings: SegmentationHeadSettings) -> tuple[int, ...]:
    """Returns the numbers of the blocks that a head sees, in rising order."""
    count = len(known)
    if settings.blocks is None:
        if settings.kind == "linear":
            return (count - 1,)
        if count < 4:
            raise UserError(f"student.head.kind=upernet sees four blocks, and the trunk has {count}; take linear")
        return tuple(count * part // 4 - 1 for part in (1, 2, 3, 4))
    wrong = [block for block in settings.blocks if not -count <= block < count]
    blocks = sorted({block % count for block in settings.blocks} if not wrong else ())
    if wrong or len(blocks) < len(settings.blocks):
        raise UserError(f"student.head.blocks={list(settings.blocks)}: the trunk has blocks 0 to {count - 1}, each once "
                        f"({few(wrong) or 'one stands there twice'})")
    return tuple(blocks)


class LinearHead(nn.Module):
    """Batch norm, dropout of channels and a 1 x 1 convolution on maps side by side, at the size of the finest."""

    def __init__(self, chosen: list[Level], classes: int, settings: SegmentationHeadSettings):
        super().__init__()
        width = sum(level.width for level in chosen)
        self.norm, self.dropout = nn.BatchNorm2d(width), nn.Dropout2d(settings.dropout)
        self.classifier = _classifier(nn.Conv2d(width, classes, 1))

    def forward(self, maps: list[Tensor]) -> dict[str, Tensor]:
        """Returns the scores of the classes."""
        size = maps[0].shape[2:]  # rising blocks have coarser maps
        side_by_side = [maps[0], *(nn.functional.interpolate(one, size, mode="bilinear") for one in maps[1:])]
        return {MAIN: self.classifier(self.dropout(self.norm(torch.cat(side_by_side, 1))))}


class UperNet(nn.Module):
    """transformers' UperNet with a pyramid of the maps, if all have one stride; in training with an FCN head on the third map."""

    def __init__(self, chosen: list[Level], classes: int, settings: SegmentationHeadSettings):
        super().__init__()
        try:
            from transformers import UperNetConfig
            from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead
        except ImportError:
            raise UserError("student.head.kind=upernet needs transformers: pip install 'eva-mim[dense]'") from None
        widths = [level.width for level in chosen]
        plain = len({level.stride for level in chosen}) == 1
        self.pyramid = nn.ModuleList(pyramid(width, factor) if plain else nn.Identity()
                                     for width, factor in zip(widths, (4, 2, 1, 0.5), strict=True))
        config = UperNetConfig(  # type: ignore[call-arg]  # transformers' base class takes num_labels
            hidden_size=settings.width, num_labels=classes, pool_scales=[1, 2, 3, 6], auxiliary_channels=settings.width // 2,
            auxiliary_num_convs=1, auxiliary_concat_input=False)
        heads: list[Any] = [UperNetHead(config, widths)]  # type: ignore[no-untyped-call]
        heads += [UperNetFCNHead(config, widths)] if settings.auxiliary else [None]
        for head in filter(None, heads):  # mmsegmentation drops channels before the last convolution, transformers' heads do not
            head.classifier = nn.Sequential(nn.Dropout2d(settings.dropout), _classifier(head.classifier))
        self.decoder, self.auxiliary = heads

    def forward(self, maps: list[Tensor]) -> dict[str, Tensor]:
        """Returns the scores of the classes, in training also those of the auxiliary head."""
        scaled = [layers(one) for layers, one in zip(self.pyramid, maps, strict=True)]
        found = {MAIN: self.decoder(scaled)}
        return found | ({AUXILIARY: self.auxiliary(scaled)} if self.training and self.auxiliary is not None else {})


def _classifier(layer: nn.Conv2d) -> nn.Conv2d:
    nn.init.normal_(layer.weight, std=INIT_STD)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer
