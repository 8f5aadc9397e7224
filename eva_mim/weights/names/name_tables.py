"""Tensor names of the original EVA code beside timm's, and names that only one side has.

Sources: section 6 of the facts on the original code, the golden fixtures, and `state_dict()` of timm 1.0.31 and open_clip 3.3.
"""

from __future__ import annotations

import re
from typing import Literal

Qkv = Literal["fused", "split"]
Mlp = Literal["plain", "packed", "naive", "geglu"]
"""packed: gate and value of a SwiGLU in one matrix, gate first. naive: one matrix each. geglu: ViTamin's."""

_MLP = {
    "plain": {"fc1": "fc1", "fc2": "fc2"},
    "packed": {"w12": "fc1", "w3": "fc2"},
    "naive": {"w1": "fc1_g", "w2": "fc1_x", "w3": "fc2"},
    "geglu": {"w0": "w0", "w1": "w1", "w2": "w2"},
}
_LEAVES = ("weight", "bias")


def block_names(qkv: Qkv, mlp: Mlp) -> dict[str, str]:
    """Returns original name -> timm's name of every tensor that a block of this layout may have, both without `blocks.N.`.

    The mapping is one to one, so that it can be inverted. If q, k and v are separate, timm keeps the biases in the projections;
    the BEiT family has none for k in either scheme.
    """
    modules = {name: name for name in ("norm1", "norm2", "attn.proj")}
    modules |= {"attn.inner_attn_ln": "attn.norm", "mlp.ffn_ln": "mlp.norm"}
    modules |= {f"mlp.{old}": f"mlp.{new}" for old, new in _MLP[mlp].items()}
    names = {f"{old}.{leaf}": f"{new}.{leaf}" for old, new in modules.items() for leaf in _LEAVES}
    names |= {name: name for name in ("gamma_1", "gamma_2", "attn.relative_position_bias_table")}
    if qkv == "split":
        names |= {f"attn.{part}_proj.weight": f"attn.{part}_proj.weight" for part in "qkv"}
        return names | {f"attn.{part}_bias": f"attn.{part}_proj.bias" for part in "qv"}
    return names | {f"attn.{leaf}": f"attn.{leaf}" for leaf in ("qkv.weight", "qkv.bias", "q_bias", "v_bias")}


ROOT = frozenset(
    ["cls_token", "pos_embed", "rel_pos_bias.relative_position_bias_table"]
    + [f"{module}.{leaf}" for module in ("patch_embed.proj", "norm", "fc_norm", "head") for leaf in _LEAVES]
)
"""Names outside blocks that both schemes share."""

OUTSIDE = {
    "lm_head": {"mask_token": "mask_token", "lm_head.weight": "head.weight", "lm_head.bias": "head.bias"},
    "decoder_pred": {
        "mask_token": "mask_token", "decoder_pred.weight": "head.weight", "decoder_pred.bias": "head.bias",
        **{f"{module}.{leaf}": f"{module}.{leaf}" for module in ("decoder_embed", "decoder_norm") for leaf in _LEAVES},
    },
}
"""Predicting head -> original name -> name in the `head.safetensors` of a masked stage. The names of `decoder_blocks.N` are a
ViT block's in both."""

BUFFER = re.compile(
    r"(blocks\.\d+\.attn\.)?rope\.freqs_(cos|sin)"
    r"|(rel_pos_bias|blocks\.\d+\.attn)\.relative_position_index"
    r"|decoder_pos_embed"
)
"""Tables that the original code stores and this project computes."""
DECOUPLED = re.compile(
    r"(blocks\.\d+\.attn\.)?rel_pos_bias\.relative_position_(bias_for_(high|width)|(high|width)_index)"
)
"""Separate relative positions by row and by column, which no library has."""
TIMM_ONLY = re.compile(
    r"reg_token|norm_pre\.(weight|bias)|patch_embed\.(backbone|norm)\..+|attn_pool\..+"
    r"|blocks\.\d+\.(ls[12]\.gamma|attn\.[qk]_norm\.(weight|bias)|(attn|mlp)\.norm\.(weight|bias))"
)
"""Tensors of timm's ViT, Eva and Beit that no EVA model has."""
RESBLOCK = [f"attn.in_proj_{leaf}" for leaf in _LEAVES] + [
    f"{module}.{leaf}" for module in ("ln_1", "ln_2", "attn.out_proj", "mlp.c_fc", "mlp.c_proj") for leaf in _LEAVES
]
"""Every tensor of a block of CLIP's own towers, after `transformer.resblocks.N.`."""
_RESBLOCK = rf"transformer\.resblocks\.\d+\.({'|'.join(map(re.escape, RESBLOCK))})"
TEXT = re.compile(
    r"(text\.)?(positional_embedding|text_projection|token_embedding\.weight|ln_final\.(weight|bias)|logit_scale|"
    + _RESBLOCK + ")"
)
"""Tensors of CLIP's text tower: EVA-CLIP, open_clip and OpenAI use the same names, with or without `text.`."""
OPEN_CLIP_ONLY = re.compile(r"visual\.head\..+|logit_bias")
OPENAI_VISUAL = re.compile(
    r"visual\.(class_embedding|positional_embedding|proj|conv1\.weight|(ln_pre|ln_post)\.(weight|bias)|" + _RESBLOCK + ")"
)
OPENAI_NUMBERS = ("input_resolution", "context_length", "vocab_size")
"""Sizes that OpenAI's scripted models keep among their weights; open_clip infers them from the shapes."""

_BLOCK = re.compile(r"(decoder_)?blocks\.(\d+)\.(.+)")


def outside(name: str, *, ours: bool) -> bool:
    """True for the mask token, predicting head or decoder of a masked model, under our names (`ours`) or the original ones."""
    if found := split_block(name):
        return found[0] == "decoder_blocks" and found[2] in block_names("fused", "plain")
    return any(name in (table.values() if ours else table) for table in OUTSIDE.values())


def split_block(name: str) -> tuple[str, int, str] | None:
    """Splits a name inside a block into ("blocks" or "decoder_blocks", number, rest); returns None for any other name."""
    match = _BLOCK.fullmatch(name)
    return (f"{match[1] or ''}blocks", int(match[2]), match[3]) if match else None
