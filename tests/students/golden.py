"""The fixtures' networks as timm builds them, and their tensors. Importing this registers the architectures with timm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PIXELS = {
    "mean": MEAN, "std": STD, "input_size": (3, 112, 112), "first_conv": "patch_embed.proj", "classifier": "head",
    "pool_size": None,
}
NAMES = ["eva01_mim", "eva02_s_mim", "eva02_b_mim", "eva01_relpos", "eva01_relpos_cls", "evaL_mae"]
default_cfgs = generate_default_cfgs({f"golden_{name}": PIXELS for name in NAMES})


def _build(kind: type[nn.Module], name: str, pretrained: bool, sizes: dict[str, Any], options: dict[str, Any]) -> Any:
    arguments = {"img_size": 112, "patch_size": 14, **sizes} | options
    return build_model_with_cfg(kind, f"golden_{name}", pretrained, **arguments)


@register_model
def golden_eva01_mim(pretrained: bool = False, **options: Any) -> Eva:
    """EVA-01."""
    sizes = {"embed_dim": 88, "depth": 3, "num_heads": 4, "mlp_ratio": 384 / 88}
    return _build(Eva, "eva01_mim", pretrained, sizes, options)


@register_model
def golden_eva02_s_mim(pretrained: bool = False, **options: Any) -> Eva:
    """EVA-02 S-type: packed SwiGLU."""
    sizes = {"embed_dim": 96, "depth": 2, "num_heads": 3, "mlp_ratio": 8 / 3, "swiglu_mlp": True, "use_rot_pos_emb": True}
    return _build(Eva, "eva02_s_mim", pretrained, sizes, options)


@register_model
def golden_eva02_b_mim(pretrained: bool = False, **options: Any) -> Eva:
    """EVA-02 B-type: q, k and v apart, sub-LN."""
    sizes = {
        "embed_dim": 96, "depth": 2, "num_heads": 4, "mlp_ratio": 8 / 3, "swiglu_mlp": True, "use_rot_pos_emb": True,
        "qkv_fused": False, "scale_mlp": True,
    }
    return _build(Eva, "eva02_b_mim", pretrained, sizes, options)


RELATIVE = {"embed_dim": 48, "depth": 2, "num_heads": 4, "mlp_ratio": 3.0, "init_values": 0.1, "use_abs_pos_emb": False}


@register_model
def golden_eva01_relpos(pretrained: bool = False, **options: Any) -> Beit:
    """EVA-01 with one table of relative positions for all blocks, LayerScale, no absolute positions."""
    return _build(Beit, "eva01_relpos", pretrained, RELATIVE | {"use_shared_rel_pos_bias": True}, options)


@register_model
def golden_eva01_relpos_cls(pretrained: bool = False, **options: Any) -> Beit:
    """Its classifier: a table in each block."""
    return _build(Beit, "eva01_relpos_cls", pretrained, RELATIVE | {"use_rel_pos_bias": True}, options)


@register_model
def golden_evaL_mae(pretrained: bool = False, **options: Any) -> VisionTransformer:  # noqa: N802
    """EVA-L's encoder."""
    sizes = {"embed_dim": 64, "depth": 2, "num_heads": 4}
    return _build(VisionTransformer, "evaL_mae", pretrained, sizes, options)


def load(shared: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A fixture's tensors and facts."""
    tensors = load_file(shared / "golden" / f"{name}.safetensors")
    return tensors, json.loads((shared / "golden" / f"{name}.json").read_text())


def below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def pixels(image: Tensor) -> Tensor:
    """A fixture's normalised image as values from 0 to 255, in fp32 (rounded once)."""
    shift, scale = (torch.tensor(values, dtype=torch.float64).reshape(3, 1, 1) for values in (MEAN, STD))
    return ((image.double() * scale + shift) * 255).float()


def close(mine: Tensor | None, expected: Tensor, share: float) -> bool:
    """Equal up to a share of the largest expected entry."""
    assert mine is not None
    return bool((mine - expected).abs().max() < share * expected.abs().max())
