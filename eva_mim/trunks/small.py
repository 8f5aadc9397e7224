"""Architectures for small images (32 and 64 px), registered with timm when this file is imported.

open_clip builds image towers by timm's architecture name alone, so each size that timm lacks is registered here under a name.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from timm.layers import HybridEmbed, create_conv2d, get_norm_act_layer
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from timm.models.vitamin import GeGluMlp, MbConvLNBlock
from torch import Tensor, nn

_PIXELS = {
    "input_size": (3, 32, 32),
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
    "crop_pct": 1.0,
    "interpolation": "bicubic",
}
"""CLIP's mean and std, which EVA uses for student, teacher and every later stage (facts of EVA-01/eva/datasets.py)."""

default_cfgs = generate_default_cfgs(
    {
        "vit_nano_patch4_32.untrained": {**_PIXELS, "first_conv": "patch_embed.proj", "classifier": "head"},
        "vit_nano_patch4_24.untrained": {
            **_PIXELS, "input_size": (3, 24, 24), "first_conv": "patch_embed.proj", "classifier": "head"},
        "vit_mini_patch4_32.untrained": {**_PIXELS, "first_conv": "patch_embed.proj", "classifier": "head"},
        "vit_nano6_patch4_32.untrained": {**_PIXELS, "first_conv": "patch_embed.proj", "classifier": "head"},
        "convnet_nano_32.untrained": {
            **_PIXELS, "first_conv": "stem.conv", "classifier": "head.fc", "pool_size": (8, 8)},
        "convnet_nano_24.untrained": {
            **_PIXELS, "input_size": (3, 24, 24), "first_conv": "stem.conv", "classifier": "head.fc", "pool_size": (6, 6)},
        "convnet_mini_32.untrained": {
            **_PIXELS, "first_conv": "stem.conv", "classifier": "head.fc", "pool_size": (8, 8)},
        "vit_nano_patch8_64.untrained": {
            **_PIXELS, "input_size": (3, 64, 64), "first_conv": "patch_embed.proj", "classifier": "head"},
        "vitamin_nano_32.untrained": {**_PIXELS, "first_conv": "patch_embed.backbone.stem.conv1", "classifier": "head"},
        "vitamin_nano_64.untrained": {
            **_PIXELS, "input_size": (3, 64, 64), "first_conv": "patch_embed.backbone.stem.conv1", "classifier": "head"},
        "convnet_mini_64.untrained": {
            **_PIXELS, "input_size": (3, 64, 64), "first_conv": "stem.conv", "classifier": "head.fc", "pool_size": (8, 8)},
    }
)


VITS: dict[str, dict[str, Any]] = {
    "vit_nano_patch4_32": {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3},
    "vit_nano_patch4_24": {"img_size": 24, "patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3},
    "vit_nano6_patch4_32": {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3},
    "vit_mini_patch4_32": {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4},
    "vit_nano_patch8_64": {"img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3},
}
"""Sizes of the plain ViTs: 0.5 M parameters, with 6 blocks 0.7, and the mini 1.2."""
KNOWN = "vit_tiny_patch16_224"
"""timm's own name of a plain ViT that takes these sizes as keywords."""


def known_to_timm(name: str, arguments: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Returns name and keywords with which plain timm, without this project, builds an architecture: of our ViTs timm's name and
    all sizes, and any other one as it is. (timm has no name for the convolutional networks of this file.)"""
    return (KNOWN, {**VITS[name], **arguments}) if name in VITS else (name, dict(arguments))


def _vit(name: str, pretrained: bool, options: dict[str, Any]) -> VisionTransformer:
    return build_model_with_cfg(  # the filter resizes the positions of a file of another size
        VisionTransformer, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **VITS[name] | options)


@register_model
def vit_nano_patch4_32(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """Builds a plain ViT, width 96, depth 4, for 32 px."""
    return _vit("vit_nano_patch4_32", pretrained, options)


@register_model
def vit_nano_patch4_24(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """Builds a plain ViT, width 96, depth 4, for 24 px."""
    return _vit("vit_nano_patch4_24", pretrained, options)


@register_model
def vit_nano6_patch4_32(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """Builds a plain ViT, width 96, depth 6, for 32 px: as many multiply-adds as `vitamin_nano_32`."""
    return _vit("vit_nano6_patch4_32", pretrained, options)


@register_model
def vit_mini_patch4_32(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """Builds a plain ViT, width 128, depth 6, for 32 px."""
    return _vit("vit_mini_patch4_32", pretrained, options)


@register_model
def vit_nano_patch8_64(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """Builds a plain ViT, width 96, depth 4, 8 x 8 patches of 8 px."""
    return _vit("vit_nano_patch8_64", pretrained, options)


def _convnet(name: str, widths: tuple[int, int, int], pretrained: bool, **options: Any) -> ByobNet:
    """Builds a residual network with a 3x3 stem; its map has a quarter of the image's side."""
    stem, middle, last = widths
    blocks = (
        ByoBlockCfg(type="basic", d=1, c=stem, s=1, gs=0, br=1.0),
        ByoBlockCfg(type="basic", d=1, c=middle, s=1, gs=0, br=1.0),
        ByoBlockCfg(type="basic", d=2, c=last, s=2, gs=0, br=1.0),
    )
    return build_model_with_cfg(
        ByobNet, name, pretrained, model_cfg=ByoModelCfg(blocks=blocks, stem_chs=stem, stem_type="3x3", stem_pool=""), **options
    )


@register_model
def convnet_nano_32(pretrained: bool = False, **options: Any) -> ByobNet:
    """Builds a residual network, widths 32/64/128."""
    return _convnet("convnet_nano_32", (32, 64, 128), pretrained, **options)


@register_model
def convnet_nano_24(pretrained: bool = False, **options: Any) -> ByobNet:
    """Builds a residual network, widths 24/48/96; 24 px in, a 6 x 6 map out."""
    return _convnet("convnet_nano_24", (24, 48, 96), pretrained, **options)


@register_model
def convnet_mini_32(pretrained: bool = False, **options: Any) -> ByobNet:
    """Builds a residual network, widths 64/128/256."""
    return _convnet("convnet_mini_32", (64, 128, 256), pretrained, **options)


@register_model
def convnet_mini_64(pretrained: bool = False, **options: Any) -> ByobNet:
    """Builds a residual network with a 3x3 stem (stride 2), widths 64/128/256; 64 px in, an 8 x 8 map out."""
    blocks = (
        ByoBlockCfg(type="basic", d=1, c=64, s=2, gs=0, br=1.0),
        ByoBlockCfg(type="basic", d=1, c=128, s=2, gs=0, br=1.0),
        ByoBlockCfg(type="basic", d=2, c=256, s=1, gs=0, br=1.0),
    )
    return build_model_with_cfg(
        ByobNet, "convnet_mini_64", pretrained,
        model_cfg=ByoModelCfg(blocks=blocks, stem_chs=32, stem_type="3x3", stem_pool=""), **options
    )


HYBRID_WIDTHS, HYBRID_DEPTHS = (32, 48), (1, 2)
"""Channels and blocks of the convolutional stages, whose maps have a half and a quarter of the stem's sides."""


class HybridStem(nn.Module):
    """Two 3x3 convolutions; the first has stride 2 in ViTamin, and 1 for images of a seventh of the size."""

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.conv1 = create_conv2d(channels, width, 3, stride=stride, bias=True)
        self.norm1 = partial(get_norm_act_layer("layernorm2d", "gelu"), eps=1e-6)(width)
        self.conv2 = create_conv2d(width, width, 3, bias=True)

    def forward(self, pixels: Tensor) -> Tensor:
        """Returns [B, C, H / stride, W / stride] of [B, channels, H, W]."""
        out: Tensor = self.conv2(self.norm1(self.conv1(pixels)))
        return out


class HybridStages(nn.Module):
    """Stem and two stages of ViTamin's inverted bottlenecks."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.stem, before = HybridStem(channels, HYBRID_WIDTHS[0], stride), HYBRID_WIDTHS[0]
        stages = []
        for width, depth in zip(HYBRID_WIDTHS, HYBRID_DEPTHS, strict=True):
            sizes = [(before, 2), *[(width, 1)] * (depth - 1)]
            stages.append(nn.Sequential(*(MbConvLNBlock(wide, width, stride=stride) for wide, stride in sizes)))
            before = width
        self.stages = nn.Sequential(*stages)

    def forward(self, pixels: Tensor) -> Tensor:
        """Returns a map of a quarter of the stem's sides [B, C, h, w]."""
        out: Tensor = self.stages(self.stem(pixels))
        return out


def _vitamin(name: str, side: int, stride: int, pretrained: bool, options: dict[str, Any]) -> VisionTransformer:
    backbone = HybridStages(options.get("in_chans", 3), stride)
    arguments: dict[str, Any] = {
        "embed_layer": partial(HybridEmbed, backbone=backbone), "patch_size": 1, "img_size": side, "embed_dim": 96, "depth": 4,
        "num_heads": 3, "mlp_layer": GeGluMlp, "mlp_ratio": 2.0, "class_token": False, "global_pool": "avg",
    }
    return build_model_with_cfg(
        VisionTransformer, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **arguments | options)


@register_model
def vitamin_nano_32(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """Builds a hybrid for 32 px, 8 x 8 patches: convolutional stages of widths 32 and 48, then 4 blocks of width 96."""
    return _vitamin("vitamin_nano_32", 32, 1, pretrained, options)


@register_model
def vitamin_nano_64(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """Builds the same hybrid for 64 px, with a stride of 2 in its stem, as ViTamin has it: 8 x 8 patches."""
    return _vitamin("vitamin_nano_64", 64, 2, pretrained, options)
