"""ViTamins of any size: their third stage has a width and a depth, and the two convolutional stages follow (Chen et al. 2024).

The names are `vitamin_w512_d12`, for 224 px. timm and open_clip know one after `register("vitamin_w512_d12")`; this package
registers them by itself. This file imports no torch before it.
"""

from __future__ import annotations

import re
from typing import Any

from eva_mim.core.errors import UserError

NAME = re.compile(r"vitamin_w(\d+)_d(\d+)")
HEAD, CHANNELS, MBCONV_BLOCKS = 64, 32, (2, 4)
"""Channels of a head of attention; what the widths of the convolutions are multiples of; blocks of the convolutional stages."""
DEPTHS = ((200e6, 14), (float("inf"), 31))
"""Parameters up to which a depth is taken: 14 blocks in ViTamin-S and B (22 M, 88 M), 31 in L (333 M)."""
WIDEST = 4096
default_cfgs: dict[str, Any] = {}
"""timm's descriptions of what is registered; timm reads them by this name."""


def name_of(width: int | None, depth: int | None, parameters: float | None) -> str:
    """Returns the name for a width and a depth, or for a number of parameters: the depth of the published model of that size, and
    the width, a multiple of a head, that comes closest. Raises ValueError."""
    if (parameters is None) == (width is None or depth is None) or (parameters is not None and (width or depth)):
        raise ValueError("student.name=vitamin needs either student.width and student.depth, or student.params")
    if parameters is not None:
        depth = next(blocks for limit, blocks in DEPTHS if parameters <= limit)
        width = min(range(HEAD, WIDEST + 1, HEAD), key=lambda one: abs(count(one, depth) - parameters))
    assert width is not None
    assert depth is not None
    if width % HEAD or not 0 < width <= WIDEST or depth < 1:
        raise ValueError(f"student.width={width}, student.depth={depth}: the width must be a multiple of {HEAD} up to {WIDEST}, "
                         "the depth 1 or more")
    return f"vitamin_w{width}_d{depth}"


def stem_width(width: int) -> int:
    """Returns the channels of the stem and the first stage; the second has twice as many. A sixth of `width`, rounded to a
    multiple of 32, as in all published models."""
    return max(CHANNELS, CHANNELS * round(width / 6 / CHANNELS))


def count(width: int, depth: int) -> int:
    """Returns about how many parameters the trunk has: products and convolutions, without vectors."""
    stem = stem_width(width)
    total, before = 9 * stem * (3 + stem), stem
    for channels, blocks in zip((stem, 2 * stem), MBCONV_BLOCKS, strict=True):
        for block in range(blocks):
            given = before if block == 0 else channels
            total += 4 * channels * (given + 9 + channels) + (given * channels if block == 0 else 0)
        before = channels
    return total + 9 * before * width + 10 * depth * width**2 + 196 * width


def register(name: str) -> bool:
    """Makes a name known to timm and open_clip; returns whether it is one of a ViTamin. Raises UserError for a width that no
    heads fit."""
    if (found := NAME.fullmatch(name.partition(".")[0])) is None:
        return False
    import timm
    from timm.models import generate_default_cfgs, register_model
    from timm.models.vitamin import GeGluMlp, VitCfg, VitConvCfg, _cfg, _create_vitamin

    plain, width, depth = found[0], int(found[1]), int(found[2])
    if timm.is_model(plain):
        return True
    if width % HEAD or not 0 < width <= WIDEST or depth < 1:
        raise UserError(f"student.name: {name}: the width must be a multiple of {HEAD} up to {WIDEST}, the depth 1 or more")
    stem = stem_width(width)

    def build(pretrained: bool = False, **options: Any) -> Any:
        config = VitCfg(embed_dim=(stem, 2 * stem, width), depths=(*MBCONV_BLOCKS, 1), stem_width=stem,
                        conv_cfg=VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6), head_type="1d")
        arguments: dict[str, Any] = {
            "embed_dim": width, "depth": depth, "num_heads": width // HEAD, "mlp_layer": GeGluMlp, "mlp_ratio": 2.0,
            "class_token": False, "global_pool": "avg", "embed_cfg": config,
        }
        return _create_vitamin(plain, pretrained=pretrained, **arguments | options)

    build.__name__, build.__module__ = plain, __name__
    default_cfgs.update(generate_default_cfgs({f"{plain}.untrained": _cfg(crop_pct=1.0)}))
    register_model(build)
    return True
