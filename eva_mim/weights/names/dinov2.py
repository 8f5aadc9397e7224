"""Plain ViTs under the names of transformers' DINOv2 with registers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from eva_mim.core.errors import UserError
from eva_mim.core.report import KeyReport
from eva_mim.core.settings import few
from eva_mim.weights.files.lazy import materialise
from eva_mim.weights.names.eva import Converted
from eva_mim.weights.names.huggingface import CLASSES, name_table, numbered


def to_dinov2(weights: Mapping[str, Tensor], trunk: Any) -> tuple[Converted, dict[str, Any]]:
    """Renames a plain ViT under timm's names to a file of transformers' DINOv2, whose registers are all prefix tokens after the
    first; returns the file's tensors and its config.json. Without registers it is still the class with registers, because
    that one resizes positions as timm does.

    `trunk`: timm's model of the weights. What it lacks is written as ones (scales of layers) or zeros (mask token, position of
    the class token). Raises UserError for a model with other layers than DINOv2.
    """
    made = {name: materialise(value) for name, value in weights.items()}
    _check_plain(trunk, made)
    width, depth = trunk.embed_dim, len(trunk.blocks)
    cells, registers = trunk.patch_embed.num_patches, trunk.num_prefix_tokens - 1
    rows, changed = made["pos_embed"], KeyReport()
    own = rows.shape[1] - cells  # positions of prefix tokens
    place = rows[:, :1] if own else torch.zeros_like(rows[:, :1])
    made["pos_embed"] = torch.cat([place, rows[:, own:]], 1)
    if registers and own > 1:
        made["reg_token"] = made["reg_token"] + rows[:, 1:own]
        changed.reasons["embeddings.register_tokens"] = "positions of the registers are added: DINOv2 has none for them"
    for block in range(depth):
        for scale in ("ls1", "ls2"):
            made.setdefault(f"blocks.{block}.{scale}.gamma", torch.ones(width, dtype=rows.dtype))
    made.setdefault("reg_token", torch.empty(1, 0, width, dtype=rows.dtype))
    kind = "dinov2_with_registers"
    table, found = name_table(kind), dict[str, Tensor]()
    for name, value in made.items():
        pattern, block_number = numbered(name)
        names = [new.replace(".N.", block_number) for new in table[pattern]]
        found |= zip(names, value.chunk(len(names)), strict=True)
    found["embeddings.mask_token"] = torch.zeros(1, width, dtype=rows.dtype)
    changed.loaded += found
    config = {
        "model_type": kind, "architectures": [CLASSES[kind][0]], "hidden_size": width, "num_hidden_layers": depth,
        "num_attention_heads": trunk.blocks[0].attn.num_heads, "mlp_ratio": trunk.blocks[0].mlp.fc1.out_features // width,
        "hidden_act": "gelu", "layer_norm_eps": trunk.norm.eps, "image_size": trunk.patch_embed.img_size[0],
        "patch_size": trunk.patch_embed.patch_size[0],
        "num_channels": trunk.patch_embed.proj.in_channels, "qkv_bias": trunk.blocks[0].attn.qkv.bias is not None,
        "use_swiglu_ffn": False, "num_register_tokens": registers,
    }
    return Converted(found, changed), config


def _check_plain(trunk: Any, weights: Mapping[str, Tensor]) -> None:
    """Raises UserError, with the layer, for a model that is no DINOv2 in other words."""
    def refused(what: str) -> UserError:
        return UserError(f"--to transformers: {what}, and DINOv2 there has not; use --to hf, which transformers opens as "
                         "TimmWrapperModel")

    if type(trunk) is not VisionTransformer:
        raise UserError("--to transformers: only OpenAI's CLIP and plain ViTs have names of their own there; use --to hf: "
                        "transformers opens timm's folder as TimmWrapperModel")
    if trunk.cls_token is None:
        raise UserError("--to transformers: the model has no class token, and DINOv2 there has one; use --to hf")
    if trunk.pos_embed is None:
        raise UserError("--to transformers: the model has no positions, and DINOv2 there has a table of them; use --to hf")
    if trunk.patch_embed.img_size[0] != trunk.patch_embed.img_size[1]:
        raise UserError(f"--to transformers: images of {trunk.patch_embed.img_size} are not square")
    block, (rows, columns) = trunk.blocks[0], trunk.patch_embed.patch_size
    width, hidden = trunk.embed_dim, block.mlp.fc1.out_features
    if rows != columns:
        raise refused(f"its patches are {rows}x{columns}")
    if hidden % width:
        raise refused(f"its MLP is {hidden / width:g} times as wide as its tokens, not a whole number of times")
    if type(block.mlp.act) is not nn.GELU or block.mlp.act.approximate != "none":
        raise refused(f"its MLP has {type(block.mlp.act).__name__}")
    if unknown := [name for name in weights if numbered(name)[0] not in name_table("dinov2_with_registers")]:
        raise refused(f"it has {few(unknown)}")
