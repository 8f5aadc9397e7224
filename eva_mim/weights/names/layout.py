"""Structure and naming scheme of a ViT's blocks, read from the names and shapes of a trunk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NoReturn

from eva_mim.core.errors import UserError
from eva_mim.core.settings import few
from eva_mim.weights.names.name_tables import BUFFER, DECOUPLED, ROOT, TIMM_ONLY, Mlp, Qkv, block_names, split_block

Shape = tuple[int, ...]
Scheme = Literal["eva", "timm", "open_clip", "openai", "stage"]
"""Naming scheme: the original code's, a library's, OpenAI's, or that of a student in training (`trunk.`, `model.`)."""
RANKS = {
    **dict.fromkeys(["patch_embed.proj.weight", "visual.conv1.weight"], 4),
    **dict.fromkeys(["pos_embed", "cls_token", "reg_token", "mask_token", "decoder_pos_embed"], 3),
    **dict.fromkeys([f"mlp.{part}.weight" for part in ("fc1", "fc2", "fc1_g", "fc1_x", "c_fc")], 2),
    **dict.fromkeys([f"mlp.{part}.weight" for part in ("w0", "w1", "w2", "w3", "w12")], 2),
    **dict.fromkeys([f"{part}.weight" for part in ("attn.proj", "head", "lm_head", "token_embedding")], 2),
    **dict.fromkeys([f"decoder_{part}.weight" for part in ("pred", "embed")], 2),
    **dict.fromkeys([f"relative_position_{part}" for part in ("bias_table", "bias_for_high", "bias_for_width", "index")], 2),
    **dict.fromkeys(["rope.freqs_cos", "rope.freqs_sin", "positional_embedding", "text_projection", "visual.proj"], 2),
    **dict.fromkeys(["norm1.weight", "decoder_norm.weight", "q_norm.weight", "class_embedding"], 1),
}
"""End of a name -> number of dimensions, for tensors whose sizes are read."""
MAX_NAMES = 100_000
"""Largest number of tensors. The largest models have a few thousand; more come from broken or hostile files and take long to
scan."""
OWN_SCHEME: dict[str, Scheme] = {"trunk.": "stage", "model.visual.trunk.": "stage", "visual.trunk.": "open_clip"}
"""Prefix of the trunk -> scheme, for prefixes that determine the scheme alone."""


@dataclass(frozen=True)
class Layout:
    """The structure that all blocks of a trunk share."""

    schemes: tuple[Scheme, ...]
    depth: int
    qkv: Qkv
    mlp: Mlp
    block: dict[str, Shape]
    """Shapes of one block's tensors, by name without `blocks.N.`."""

    @property
    def hidden(self) -> int:
        """Input width of the MLP's last layer."""
        last = {"geglu": "w2"}.get(self.mlp, "w3" if "mlp.w3.weight" in self.block else "fc2")
        return self.block[f"mlp.{last}.weight"][1]


def check_shapes(shapes: Mapping[str, Shape]) -> None:
    """Raises UserError for too many tensors, for an empty one, and for one without the number of dimensions that its name
    requires."""
    if len(shapes) > MAX_NAMES:
        raise UserError(f"checkpoint: {len(shapes)} tensors; a model has at most {MAX_NAMES}")
    for name, shape in shapes.items():
        parts = name.split(".")
        for count in (1, 2, 3):
            wanted = RANKS.get(".".join(parts[-count:]))
            if wanted and (len(shape) != wanted or 0 in shape):
                raise UserError(f"checkpoint: {name} has the shape {list(shape)}; it needs {wanted} dimensions, none of them 0")


def read_layout(trunk: Mapping[str, Shape], prefix: str, outside: Iterable[str]) -> Layout:
    """Returns the layout of a trunk, whose names stood below `prefix` beside the original names `outside` of a predicting head.

    Raises UserError for blocks that differ, missing parts, a mixture of two schemes, unknown names, and two biases of q and v.
    """
    blocks = same_blocks(trunk, "blocks.")
    block = blocks[0]
    qkv: Qkv = "split" if "attn.q_proj.weight" in block else "fused"
    mlp = _mlp(block)
    layout = Layout(_schemes(trunk, block, qkv, mlp, prefix, outside), len(blocks), qkv, mlp, block)
    if missing := _missing(trunk, layout):
        refuse(trunk, missing)
    if unknown := [name for name in trunk if not _understood(name, layout)]:
        raise UserError(f"checkpoint: {len(unknown)} tensors belong to no model that is known here: {few(unknown)}")
    if {"attn.q_bias", "attn.qkv.bias"} <= block.keys():
        raise UserError("checkpoint: two biases of q and v in every block, attn.qkv.bias beside attn.q_bias and attn.v_bias; no "
                        "model adds both, remove one")
    return layout


def same_blocks(names: Mapping[str, Shape], stem: str, what: str = "") -> list[dict[str, Shape]]:
    """Returns the shapes of each block `stem`N by the rest of the name. Raises UserError unless the blocks are alike and
    numbered from 0."""
    blocks: dict[int, dict[str, Shape]] = {}
    for name, shape in names.items():
        digits, _, rest = name.removeprefix(stem).partition(".")
        if name.startswith(stem) and digits.isdecimal():
            blocks.setdefault(int(digits), {})[rest] = shape
    for number in range(len(blocks)):
        if number not in blocks:
            refuse(names, [f"{what}{stem}{number}: there are {len(blocks)} blocks, up to {max(blocks)}"])
        block = blocks[number]
        if block != blocks[0]:
            lacks = [f"{what}{stem}{number}.{rest}" for rest in blocks[0] if rest not in block]
            other = [f"{what}{stem}{number}.{rest} as in block 0" for rest in block if blocks[0].get(rest) != block[rest]]
            refuse(names, lacks + other)
    return [blocks[number] for number in range(len(blocks))]


def _mlp(block: dict[str, Shape]) -> Mlp:
    if "mlp.w0.weight" in block:
        return "geglu"
    if "mlp.w12.weight" in block:
        return "packed"
    if "mlp.w1.weight" in block or "mlp.fc1_g.weight" in block:
        return "naive"
    first, second = block.get("mlp.fc1.weight"), block.get("mlp.fc2.weight")
    return "packed" if first and second and first[0] == 2 * second[1] else "plain"


def _schemes(
    trunk: Mapping[str, Shape], block: dict[str, Shape], qkv: Qkv, mlp: Mlp, prefix: str, outside: Iterable[str]
) -> tuple[Scheme, ...]:
    """Returns the schemes that have these names; the original code and timm share many. Raises UserError for a mixture of
    both."""
    if prefix in OWN_SCHEME:
        return (OWN_SCHEME[prefix],)
    table = block_names(qkv, mlp)
    original = [old for old in table if old in block and old not in table.values()]
    original += [name for name in trunk if BUFFER.fullmatch(name) or DECOUPLED.fullmatch(name)] + list(outside)
    timm = [new for new in table.values() if new in block and new not in table]
    timm += [name for name in trunk if TIMM_ONLY.fullmatch(name)]
    if mlp == "packed" and "mlp.fc1.weight" in block:
        timm.append("mlp.fc1.weight of gate and value")
    if prefix == "visual.":
        original.append("visual.")
    if original and timm:
        raise UserError(f"checkpoint: ambiguous, names of the original code ({few(original)}) beside timm's ({few(timm)})")
    return ("eva",) if original else ("timm",) if timm else ("eva", "timm")


def _understood(name: str, layout: Layout) -> bool:
    """True if a model of the scheme has this tensor in its trunk."""
    table = block_names(layout.qkv, layout.mlp)
    found = split_block(name)
    if name in ROOT or (found and found[0] == "blocks" and found[2] in (table if _original(layout) else table.values())):
        return True
    if _original(layout):
        return bool(BUFFER.fullmatch(name) or DECOUPLED.fullmatch(name))
    return TIMM_ONLY.fullmatch(name) is not None


def _original(layout: Layout) -> bool:
    return "eva" in layout.schemes


def _missing(trunk: Mapping[str, Shape], layout: Layout) -> list[str]:
    """Returns the names that a trunk of this layout requires and lacks."""
    block, table = layout.block, block_names(layout.qkv, layout.mlp)
    optional = (
        "attn.inner_attn_ln", "mlp.ffn_ln", "attn.norm", "mlp.norm", "attn.qkv.bias", "attn.q_proj.bias", "attn.v_proj.bias",
    )
    needed = [old if old in block or _original(layout) else new for old, new in table.items()]
    missing = [
        f"blocks.0.{name}" for name in needed
        if name.endswith((".weight", ".bias")) and name not in block and not name.startswith(optional)
    ]
    for pair in (("attn.q_bias", "attn.v_bias"), ("attn.q_proj.bias", "attn.v_proj.bias"), ("gamma_1", "gamma_2")):
        missing += [f"blocks.0.{name}" for name in pair if name not in block and block.keys() & set(pair)]
    tables = {"rope.freqs_cos", "rope.freqs_sin"}
    missing += sorted(tables - trunk.keys()) if any("rope.freqs" in name for name in trunk) else []
    if not any(name.startswith("patch_embed.") for name in trunk):
        missing.append("patch_embed.proj.weight")
    if not {"norm.weight", "fc_norm.weight"} & trunk.keys():
        missing.append("norm.weight or fc_norm.weight")
    if layout.schemes == ("eva",):
        missing += [] if "cls_token" in trunk else ["cls_token"]
        relative = any("relative_position_bias_" in name for name in trunk)
        missing += [] if "pos_embed" in trunk or relative else ["pos_embed or relative positions"]
    return missing


def refuse(names: Iterable[str], missing: list[str]) -> NoReturn:
    """Raises UserError with the names found, counted by their first part, and the names missing."""
    seen = Counter(name.partition(".")[0] for name in names)
    listing = ", ".join(f"{name} ({count})" for name, count in seen.most_common(12)) or "nothing"
    hint = ""
    if seen and seen.keys() <= {"mask_token", "head", "decoder_embed", "decoder_norm", "decoder_blocks"}:
        hint = "; this is the head.safetensors of a masked stage, whose trunk is in model.safetensors"
    raise UserError(f"checkpoint: of no family that is known here{hint}; seen: {listing}; missing: {few(missing)}")
