"""Recognising the architecture of a checkpoint by the names and shapes of its tensors alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from eva_mim.core.errors import UserError
from eva_mim.core.settings import few
from eva_mim.weights.names.layout import Layout, Scheme, Shape, check_shapes, read_layout, refuse, same_blocks
from eva_mim.weights.names.name_tables import (
    DECOUPLED,
    OPEN_CLIP_ONLY,
    OPENAI_NUMBERS,
    OPENAI_VISUAL,
    OUTSIDE,
    RESBLOCK,
    TEXT,
    Mlp,
    Qkv,
)
from eva_mim.weights.names.name_tables import outside as is_outside

Form = Literal["mim", "classifier", "features", "clip tower", "clip"]
Name = Literal["EVA-01", "EVA-02", "EVA-L", "ViT", "OpenAI CLIP"]
Bias = Literal["q, v", "q, k, v", "none"]
Relative = Literal["none", "shared", "per block", "decoupled"]

PREFIXES = ("model.visual.trunk.", "visual.trunk.", "trunk.", "visual.", "")
"""Prefixes below which a ViT's blocks can stand."""
OPENAI_BLOCKS = "visual.transformer.resblocks."


@dataclass(frozen=True)
class Text:
    """The sizes of a CLIP text tower."""

    width: int
    depth: int
    context: int
    vocabulary: int


@dataclass(frozen=True)
class Family:
    """An architecture and its sizes, as far as names and shapes determine them; None stands for an unknown size.

    Post-norm (EVA02-CLIP-E) leaves no trace in names and shapes, and with a plain MLP looks like EVA-01. EVA-01 and timm's `Eva`
    have the same tensors under the same names, and so do EVA-L's classifier and timm's `VisionTransformer`; `schemes` then has
    both.
    """

    name: Name
    """EVA-01 has q and v biases (as BEiT). EVA-02 has SwiGLU, separate q, k and v, or rotary tables. ViT has one bias for q, k
    and v; EVA-L is a ViT with a decoder beside it, and its classifiers are plain ViTs."""
    schemes: tuple[Scheme, ...]
    form: Form
    """Task of the model. A head on the class token counts as a classifier's, unless the names begin with `visual.`."""
    prefix: str
    """Prefix of the trunk's names."""
    width: int
    depth: int
    hidden: int
    """Hidden width of the MLP; of one half, for a packed SwiGLU."""
    patch: tuple[int, int] | None
    positions: int | None
    """Rows of the absolute position table."""
    tokens: int | None
    """Number of patches; rows and columns do not follow from shapes."""
    heads: int | None
    head: int | None
    """Outputs of the head: classes, target width, or width of CLIP's shared space."""
    class_token: bool = True
    registers: int = 0
    norms: tuple[str, ...] = ()
    """Norms present: `norm` (of all tokens), `fc_norm` (of their mean)."""
    qkv: Qkv = "fused"
    bias: Bias = "q, k, v"
    mlp: Mlp = "plain"
    sub_ln: bool = False
    inner_attn_ln: bool = False
    layer_scale: bool = False
    relative: Relative = "none"
    rope: bool | None = None
    """True: rotary tables are present. False: the original code would store them, and there are none. None: timm never stores
    them."""
    decoder: tuple[int, int] | None = None
    """(width, depth) of EVA-L's decoder."""
    text: Text | None = None

    def timm_class(self) -> str:
        """Returns the name of timm's class for the trunk. Raises UserError if timm has none."""
        if self.name == "OpenAI CLIP":
            return "VisionTransformer"
        relative = self.relative != "none"
        lacks = {
            "decoupled relative positions": self.relative == "decoupled",
            "relative positions beside rotary ones": relative and bool(self.rope),
            "relative positions with q, k and v apart": relative and self.qkv == "split",
            "relative positions with sub-LN": relative and (self.sub_ln or self.inner_attn_ln),
            "relative positions with a packed SwiGLU": relative and self.mlp == "packed",
            "relative positions with a k bias": relative and self.bias == "q, k, v",
            "a k bias together with a SwiGLU of EVA-02": self.name == "EVA-02" and self.bias == "q, k, v" and self.mlp != "plain",
            "a k bias together with gamma_1": self.name in ("EVA-L", "ViT") and self.layer_scale and "eva" in self.schemes,
        }
        if missing := [what for what, here in lacks.items() if here]:
            raise UserError(f"timm cannot represent this checkpoint: no model of it has {' or '.join(missing)}")
        return "Beit" if relative else "VisionTransformer" if self.name in ("EVA-L", "ViT") else "Eva"


def detect(weights: Mapping[str, Any]) -> Family:
    """Returns the family of a state dict; of the values only `shape` is used.

    Raises UserError with the names found and the names missing, if a name is unknown or a block incomplete.
    """
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    check_shapes(shapes)
    if f"{OPENAI_BLOCKS}0.ln_1.weight" in shapes:
        return _openai(shapes)
    prefixes = [prefix for prefix in PREFIXES if f"{prefix}blocks.0.norm1.weight" in shapes]
    if not prefixes:
        refuse(shapes, [f"blocks.0.norm1.weight, a ViT's first block, bare or below {', '.join(PREFIXES[:-1])}"])
    if len(prefixes) > 1:
        raise UserError(f"checkpoint: ambiguous, there are blocks below each of {', '.join(map(repr, prefixes))}; keep one trunk")
    prefix = prefixes[0]
    trunk, outside, text, unknown = _sort(shapes, prefix)
    if unknown:
        raise UserError(f"checkpoint: {len(unknown)} tensors belong to no model that is known here: {few(unknown)}")
    predicting = next((head for head in (*OUTSIDE, "head") if f"{head}.weight" in outside), None)
    if outside and (predicting is None or "mask_token" not in outside):
        refuse(shapes, ["mask_token" if predicting else "lm_head.weight or decoder_pred.weight beside mask_token"])
    layout = read_layout(trunk, prefix, () if prefix == "trunk." else outside)
    head = trunk.get("head.weight") or outside.get(f"{predicting}.weight")
    return _family(trunk, layout, prefix, head[0] if head else None, _decoder(outside), bool(outside), _text(text))


def _sort(
    shapes: dict[str, Shape], prefix: str
) -> tuple[dict[str, Shape], dict[str, Shape], dict[str, Shape], list[str]]:
    """Splits tensors into (trunk without its prefix, tensors of a masked model outside the trunk, text tower, names of none of
    them)."""
    outer = "model." if prefix.startswith("model.") else ""
    trunk, outside, text, unknown = {}, {}, {}, []
    for name, shape in shapes.items():
        bare = name.removeprefix(outer)
        if prefix in ("", "trunk.") and is_outside(name, ours=prefix == "trunk."):
            outside[name] = shape
        elif name.startswith(prefix):
            trunk[name.removeprefix(prefix)] = shape
        elif "visual." in prefix and TEXT.fullmatch(bare):
            text[bare] = shape
        elif not (prefix.endswith("visual.trunk.") and OPEN_CLIP_ONLY.fullmatch(bare)):
            unknown.append(name)
    return trunk, outside, text, unknown


def _family(
    trunk: dict[str, Shape], layout: Layout, prefix: str, head: int | None, decoder: tuple[int, int] | None, masked: bool,
    text: Text | None,
) -> Family:
    """Returns the Family of a trunk whose names are known and complete."""
    block, rope, cls = layout.block, trunk.get("rope.freqs_cos"), "cls_token" in trunk
    bias: Bias = "q, k, v" if "attn.qkv.bias" in block else "none"
    if "attn.q_bias" in block or "attn.q_proj.bias" in block:
        bias = "q, v"
    inner = "attn.inner_attn_ln.weight" in block or "attn.norm.weight" in block
    form: Form = "classifier" if head else "features"
    if "visual" in prefix or (inner and head):
        form = "clip" if text else "clip tower"
    registers = trunk["reg_token"][1] if "reg_token" in trunk else 0
    positions = trunk["pos_embed"][1] if "pos_embed" in trunk else None
    kernel = trunk.get("patch_embed.proj.weight")
    return Family(
        name=_name(trunk, layout, bias, decoder is not None),
        schemes=layout.schemes, form="mim" if masked else form, prefix=prefix,
        width=block["norm1.weight"][0], depth=layout.depth, hidden=layout.hidden,
        patch=(kernel[2], kernel[3]) if kernel else None,
        positions=positions,
        tokens=rope[0] if rope else None if positions is None else _tokens(positions, cls + registers),
        heads=_heads(trunk, block),
        head=head, class_token=cls, registers=registers,
        norms=tuple(norm for norm in ("norm", "fc_norm") if f"{norm}.weight" in trunk),
        qkv=layout.qkv, bias=bias, mlp=layout.mlp,
        sub_ln="mlp.ffn_ln.weight" in block or "mlp.norm.weight" in block,
        inner_attn_ln=inner,
        layer_scale="gamma_1" in block or "ls1.gamma" in block,
        relative=_relative(trunk),
        rope=True if rope else False if layout.schemes == ("eva",) else None,
        decoder=decoder, text=text,
    )


def _name(trunk: dict[str, Shape], layout: Layout, bias: Bias, decoder: bool) -> Name:
    if "ls1.gamma" in layout.block:  # DINOv2, also with a SwiGLU
        return "ViT"
    if layout.mlp in ("packed", "naive") or layout.qkv == "split" or "rope.freqs_cos" in trunk:
        return "EVA-02"
    return "EVA-01" if bias != "q, k, v" else "EVA-L" if decoder else "ViT"


def _heads(trunk: dict[str, Shape], block: dict[str, Shape]) -> int | None:
    """Returns the heads, read from a table of relative positions, or from a head's width in a rotary table or a norm of the
    queries."""
    tables = [shape[1] for name, shape in trunk.items() if "relative_position_bias_" in name]
    widths = [trunk["rope.freqs_cos"][1]] if "rope.freqs_cos" in trunk else []
    widths += [block["attn.q_norm.weight"][0]] if "attn.q_norm.weight" in block else []
    return tables[0] if tables else block["attn.proj.weight"][1] // widths[0] if widths else None


def _decoder(outside: dict[str, Shape]) -> tuple[int, int] | None:
    depth = len(same_blocks(outside, "decoder_blocks."))
    return (outside["decoder_norm.weight"][0], depth) if "decoder_norm.weight" in outside else None


def _relative(trunk: dict[str, Shape]) -> Relative:
    if any(DECOUPLED.fullmatch(name) for name in trunk):
        return "decoupled"
    shared = "rel_pos_bias.relative_position_bias_table" in trunk
    return "shared" if shared else "per block" if "blocks.0.attn.relative_position_bias_table" in trunk else "none"


def _tokens(positions: int, prefix: int) -> int | None:
    """Returns the number of patches of a position table of `positions` rows. timm may leave out the prefix rows; then only one
    of the two counts is a square."""
    squares = [count for count in {positions - prefix, positions} if count > 0 and math.isqrt(count) ** 2 == count]
    return positions if not prefix else squares[0] if len(squares) == 1 else None


def _text(names: dict[str, Shape]) -> Text | None:
    if not names:
        return None
    bare = {name.removeprefix("text."): shape for name, shape in names.items()}
    needed = ["token_embedding.weight", "positional_embedding", "text_projection", "ln_final.weight", "logit_scale",
              *(f"transformer.resblocks.0.{name}" for name in RESBLOCK)]
    if missing := [f"{name} of the text tower" for name in needed if name not in bare]:
        refuse(names, missing)
    depth = len(same_blocks(bare, "transformer.resblocks.", "text tower's "))
    vocabulary, width = bare["token_embedding.weight"]
    return Text(width, depth, bare["positional_embedding"][0], vocabulary)


def _openai(shapes: dict[str, Shape]) -> Family:
    """Returns the family of OpenAI's ViT CLIP, whole or the image tower alone."""
    text = {name: shape for name, shape in shapes.items() if TEXT.fullmatch(name)}
    numbers = {name for name in OPENAI_NUMBERS if name in shapes}
    visual = {name.removeprefix("visual."): shape for name, shape in shapes.items() if OPENAI_VISUAL.fullmatch(name)}
    known = text.keys() | numbers | {f"visual.{name}" for name in visual}
    if unknown := sorted(shapes.keys() - known):
        raise UserError(f"checkpoint: {len(unknown)} tensors are not of OpenAI's CLIP: {few(unknown)}")
    needed = ["conv1.weight", "class_embedding", "positional_embedding", "ln_pre.weight", "ln_post.weight", "proj",
              *(f"transformer.resblocks.0.{name}" for name in RESBLOCK)]
    if missing := [f"visual.{name}" for name in needed if name not in visual]:
        refuse(shapes, missing)
    kernel, positions = visual["conv1.weight"], visual["positional_embedding"][0]
    custom = any(name.startswith("text.") for name in text)
    schemes: tuple[Scheme, ...] = ("open_clip",) if custom else ("openai",) if numbers else ("openai", "open_clip")
    return Family(
        name="OpenAI CLIP", schemes=schemes,
        form="clip" if text else "clip tower", prefix="visual.", width=kernel[0],
        depth=len(same_blocks(visual, "transformer.resblocks.", "visual.")),
        hidden=visual["transformer.resblocks.0.mlp.c_fc.weight"][0], patch=(kernel[2], kernel[3]),
        positions=positions, tokens=positions - 1, heads=None, head=visual["proj"][1], norms=("norm",), rope=False,
        text=_text(text),
    )

