"""Models that nobody has registered, from sizes: timm's keywords for a trunk, open_clip's configuration for a CLIP model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from eva_mim.core.errors import UserError
from eva_mim.weights.hints import Wanted
from eva_mim.weights.names.layout import Shape

BASES = {"Eva": "eva_giant_patch14_224", "VisionTransformer": "vit_base_patch16_224", "Beit": "beit_base_patch16_224"}
"""Class of timm -> an architecture of it that sets little more than sizes: LayerNorm eps 1e-6 and exact GELU stay."""
CLIP_BASE = "vit_base_patch16_clip_224"
"""The same for a norm in front of the blocks: LayerNorm eps 1e-5."""


def timm_keywords(want: Wanted, base: str | None) -> tuple[str, dict[str, Any]]:
    """An architecture of timm, `base` where it is named, and the keywords that make it what is wanted.

    Raises UserError with the options that are missing.
    """
    family, shapes, given = want.family, want.shapes, want.arguments
    assert family
    kind = family.timm_class()
    unknown = "checkpoint: no registered architecture of timm has these names and shapes"
    if family.patch is None or family.mlp == "geglu":
        raise UserError(f"{unknown}, and no keywords make a convolutional stem or a GeGLU; name one with --architecture")
    pre_norm = "norm_pre.weight" in shapes
    size = want.size or ((want.told.size, want.told.size) if want.told.size else None)
    act = None if want.told.quick_gelu is None else "quick_gelu" if want.told.quick_gelu else "gelu"
    missing = {
        "the number of heads: --argument num_heads=N": not want.heads,
        "rows and columns: --image-size N": not (size or "img_size" in given),
        "the activation: --argument act_layer=quick_gelu (OpenAI's CLIP) or act_layer=gelu":
            pre_norm and kind == "VisionTransformer" and not (base or act or "act_layer" in given),
        "the grid that rotary positions are scaled to: --argument ref_feat_shape=N (16 in released classifiers and CLIP towers, "
        "the grid's own side in masked models)":
            family.name == "EVA-02" and not (want.rope or {"use_rot_pos_emb", "ref_feat_shape"} & given.keys()),
    }
    if lacks := [what for what, here in missing.items() if here]:
        raise UserError(f"{unknown}, and these do not tell {'; '.join(lacks)}; or name one with --architecture")
    base = base or (CLIP_BASE if pre_norm and kind == "VisionTransformer" else BASES[kind])
    keywords = {
        "img_size": side(size), "patch_size": side(family.patch), "embed_dim": family.width, "depth": family.depth,
        "num_heads": want.heads, "mlp_ratio": _ratio(family.hidden, family.width), "global_pool": pool(shapes),
        "init_values": 1e-5 if family.layer_scale else None, "act_layer": act if kind == "VisionTransformer" else None,
    } | _parts(want, kind)
    return base, {name: value for name, value in keywords.items() if value is not None}


def pool(shapes: Mapping[str, Shape]) -> str:
    """timm's `global_pool`, by where the norm stands."""
    if "attn_pool.q.weight" in shapes:
        return "map"
    return "avg" if "fc_norm.weight" in shapes else "token" if "cls_token" in shapes else ""


def clip_config(want: Wanted) -> dict[str, Any] | None:
    """open_clip's configuration of OpenAI's architecture; None where files beside the source do not tell the heads."""
    family, shapes, told = want.family, want.shapes, want.told
    size = want.size or ((told.size, told.size) if told.size else None)
    assert family
    assert family.text
    if not (family.name == "OpenAI CLIP" and family.patch and size and told.heads and told.text_heads):
        return None
    stem = "text." if "text.positional_embedding" in shapes else ""
    hidden = shapes[f"{stem}transformer.resblocks.0.mlp.c_fc.weight"][0]
    return {
        "embed_dim": family.head, "quick_gelu": bool(told.quick_gelu), "custom_text": bool(stem),
        "vision_cfg": {
            "image_size": side(size), "patch_size": family.patch[0], "width": family.width, "layers": family.depth,
            "head_width": family.width // told.heads, "mlp_ratio": _ratio(family.hidden, family.width),
        },
        "text_cfg": {
            "context_length": family.text.context, "vocab_size": family.text.vocabulary, "width": family.text.width,
            "layers": family.text.depth, "heads": told.text_heads, "mlp_ratio": _ratio(hidden, family.text.width),
        },
    }


def side(size: tuple[int, int] | None) -> int | tuple[int, int] | None:
    """One number for a square."""
    return size[0] if size and size[0] == size[1] else size


def _ratio(hidden: int, width: int) -> float:
    """The libraries cut width * ratio to a whole number."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _parts(want: Wanted, kind: str) -> dict[str, Any]:
    """What a family has and has not, by the keywords of timm's class."""
    family, shapes = want.family, want.shapes
    assert family
    positions, pre_norm = family.positions is not None, "norm_pre.weight" in shapes
    parts: dict[str, Any] = {"qkv_bias": family.bias != "none"}
    if kind == "Beit":
        return parts | {
            "use_abs_pos_emb": positions, "use_rel_pos_bias": family.relative == "per block",
            "use_shared_rel_pos_bias": family.relative == "shared",
        }
    apart = family.class_token or family.registers
    parts |= {
        "class_token": family.class_token, "qk_norm": "blocks.0.attn.q_norm.weight" in shapes,
        "no_embed_class": bool(apart) and positions and family.positions == family.tokens,
    }
    if kind == "VisionTransformer":
        return parts | {
            "reg_tokens": family.registers, "pre_norm": pre_norm, "pos_embed": "learn" if positions else "none",
            "scale_attn_norm": family.inner_attn_ln, "scale_mlp_norm": family.sub_ln,
        }
    reference = want.rope.reference if want.rope else None
    return parts | {
        "num_reg_tokens": family.registers, "use_pre_transformer_norm": pre_norm, "use_abs_pos_emb": positions,
        "qkv_fused": family.qkv == "fused", "swiglu_mlp": family.mlp in ("packed", "naive"), "scale_mlp": family.sub_ln,
        "swiglu_align_to": int(family.mlp == "naive" and not family.sub_ln), "scale_attn_inner": family.inner_attn_ln,
        "use_rot_pos_emb": family.name == "EVA-02", "ref_feat_shape": reference and (reference, reference),
    }
