"""Models of timm and open_clip for the fixtures, built from what `detect` says. Importing this registers towers with timm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from open_clip.model import CustomTextCLIP
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from eva_mim.weights.names.buffers import Rope
from eva_mim.weights.names.families import Family
from tests.students.golden import below, load

TOWERS: dict[str, dict[str, Any]] = {
    "clip_eva02_b": {
        "img_size": 112, "patch_size": 16, "embed_dim": 96, "num_heads": 4, "mlp_ratio": 256 / 96, "qkv_fused": False,
        "swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True, "use_rot_pos_emb": True, "ref_feat_shape": (16, 16),
    },
    "clip_eva01_g": {"img_size": 84, "patch_size": 14, "embed_dim": 88, "num_heads": 4, "mlp_ratio": 384 / 88},
    "clip_eva01_b_layerscale": {"img_size": 64, "patch_size": 16, "embed_dim": 64, "num_heads": 4, "init_values": 0.1},
}
default_cfgs = generate_default_cfgs({f"names_{name}": {"first_conv": "", "classifier": "head"} for name in TOWERS})


def _tower(name: str, options: dict[str, Any]) -> Eva:
    return build_model_with_cfg(Eva, f"names_{name}", **({"pretrained": False, "depth": 2} | TOWERS[name] | options))


@register_model
def names_clip_eva02_b(**options: Any) -> Eva:
    """EVA02-CLIP-B of the fixture."""
    return _tower("clip_eva02_b", options)


@register_model
def names_clip_eva01_g(**options: Any) -> Eva:
    """EVA01-CLIP-g of the fixture."""
    return _tower("clip_eva01_g", options)


@register_model
def names_clip_eva01_b_layerscale(**options: Any) -> Eva:
    """EVA01-CLIP-B of the fixture."""
    return _tower("clip_eva01_b_layerscale", options)


def checkpoint(shared: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """(state dict under the original names, the fixture's other tensors, its facts)."""
    golden, facts = load(shared, name)
    return below(golden, "state_dict/"), golden, facts


def classifier(family: Family, heads: int, rope: Rope | None, image_size: int) -> nn.Module:
    """timm's mean-pooling classifier of a family."""
    options: dict[str, Any] = {
        "img_size": image_size, "patch_size": family.patch, "embed_dim": family.width, "depth": family.depth,
        "num_heads": heads, "mlp_ratio": family.hidden / family.width, "num_classes": family.head, "global_pool": "avg",
    }
    if family.timm_class() == "VisionTransformer":
        return VisionTransformer(**options).eval()
    return Eva(
        **options, qkv_fused=family.qkv == "fused", swiglu_mlp=family.mlp != "plain", scale_mlp=family.sub_ln,
        scale_attn_inner=family.inner_attn_ln, use_rot_pos_emb=rope is not None,
        ref_feat_shape=(rope.reference, rope.reference) if rope and rope.reference else None,
    ).eval()


def clip(name: str, facts: dict[str, Any]) -> CustomTextCLIP:
    """open_clip's model of a CLIP fixture."""
    options = facts["constructor"]
    vision = {"timm_model_name": f"names_{name}", "timm_pool": "token", "timm_proj": None,
              "image_size": options["vision_cfg"]["image_size"]}
    text = {key: options["text_cfg"][key] for key in ("context_length", "vocab_size", "width", "heads", "layers")}
    return CustomTextCLIP(options["embed_dim"], vision, text).eval()
