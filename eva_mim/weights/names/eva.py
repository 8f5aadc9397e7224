"""Renaming between the original EVA code's names and ours, and from those of a student in training to ours.

Ours are timm's names for a trunk and open_clip's for a whole CLIP model. Tensors are passed on without a copy, so that a round
trip changes no bit. A name without a counterpart is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from eva_mim.core.contracts import Grid
from eva_mim.core.errors import UserError
from eva_mim.core.report import KeyReport
from eva_mim.core.settings import few
from eva_mim.trunks.positions import sincos_table
from eva_mim.weights.files.lazy import materialise
from eva_mim.weights.names.buffers import Rope, read_rope, relative_position_index, rope_tables
from eva_mim.weights.names.families import Family, detect
from eva_mim.weights.names.layout import Scheme
from eva_mim.weights.names.name_tables import BUFFER, OUTSIDE, TEXT, block_names, split_block
from eva_mim.weights.names.name_tables import outside as is_outside

NormRule = Literal["drop", "copy", "keep"]
TRUNK = "visual.trunk."
"""Prefix of the timm model inside an open_clip model."""


@dataclass(frozen=True)
class Converted:
    """A renamed state dict, with facts that names and shapes do not hold."""

    weights: dict[str, Tensor]
    report: KeyReport
    outside: dict[str, Tensor] = field(default_factory=dict)
    """Tensors of a masked model outside its trunk, as in the `head.safetensors` of our stages: `mask_token`, `head.*`,
    `decoder_*`."""
    rope: Rope | None = None
    """Parameters of the rotary tables; `reference` is timm's `ref_feat_shape`. None without such tables."""
    grid: Grid | None = None
    """Patch grid of the tables that were left out; None without such tables."""


def from_eva(weights: Mapping[str, Tensor], family: Family | None = None) -> Converted:
    """Renames an original checkpoint to ours: a bare trunk, or a CLIP model if it has a text tower. `family` is that of
    `weights`, if known.

    Tables that can be computed are compared with the computed ones and left out; on the meta device, without values, they are
    left out unseen. Raises UserError for other names, for tables of another kind, and for a model that timm cannot represent.
    """
    family = expect_scheme(weights, "eva", family=family)
    family.timm_class()  # raises UserError if timm has no class for the trunk
    prefix = TRUNK if family.form == "clip" else ""
    table = block_names(family.qkv, family.mlp)
    tables: dict[str, Tensor] = {}
    made: dict[str, Tensor] = {}
    masked: dict[str, Tensor] = {}
    report = KeyReport()
    for name, value in weights.items():
        bare = name.removeprefix(family.prefix)
        if family.text and TEXT.fullmatch(name):
            into, new = made, text_name(name)
        elif BUFFER.fullmatch(bare):
            tables[bare] = value
            report.note(report.ignored, name, "a table that is computed from the grid")
            continue
        elif family.prefix == "" and is_outside(name, ours=False):
            into, new = masked, next((names[name] for names in OUTSIDE.values() if name in names), name)
        else:
            into, new = made, prefix + _in_block(bare, table)
        if new in into:
            if not _equal(into[new], value):
                raise UserError(f"checkpoint: {name} and another tensor are both {new} and differ; remove one of them")
            report.note(report.ignored, name, f"the same as another {new}")
            continue
        into[new] = value
        report.loaded.append(new)
    rope, grid = _read_tables(tables)
    if rope and grid and grid[0] == grid[1] and rope.reference is None and family.form != "mim":
        # on its own grid a scaled position is the index; only masked models use indices on every grid
        rope = Rope(rope.head_width, grid[0])
    return Converted(made, report, masked, rope, grid)


def to_eva(
    weights: Mapping[str, Tensor],
    outside: Mapping[str, Tensor] | None = None,
    *,
    grid: Grid | None = None,
    rope: Rope | None = None,
    tower: bool = False,
) -> Converted:
    """Renames ours to the original names and adds the tables that the original code stores (the same tensor in every block).

    `outside` is that of `from_eva`, or a stage's `head.safetensors`. `grid` is needed for tables, `rope` for EVA-02: plain
    indices for a masked model, reference 16 for released classifiers and CLIP towers. `tower` puts a bare trunk below `visual.`,
    as in a CLIP file. Raises UserError for a tensor without a place in the original code, and for a table whose sizes are not
    given.
    """
    family = expect_scheme(weights, "timm", "open_clip")
    _fits_eva(family, weights)
    back = {new: old for old, new in block_names(family.qkv, family.mlp).items()}
    prefix = "visual." if tower or family.prefix else ""
    made: dict[str, Tensor] = {}
    report = KeyReport()
    for name, value in weights.items():
        below = name.startswith(family.prefix)
        made[prefix + _in_block(name.removeprefix(family.prefix), back) if below else name] = value
    outside = outside or {}
    heads = OUTSIDE["decoder_pred" if "decoder_embed.weight" in outside else "lm_head"]
    renamed = {new: old for old, new in heads.items()}
    for name, value in outside.items():
        if prefix or not (name in renamed or (is_outside(name, ours=True) and "decoder_embed.weight" in outside)):
            kind = "a CLIP model" if prefix else f"a masked model, which has {few(renamed)}"
            raise UserError(f"checkpoint: {name} is no part of {kind}")
        made[renamed.get(name, name)] = value
    report.loaded += list(made)
    for name, value in _tables(family, outside, grid, rope).items():
        like = weights[f"{family.prefix}cls_token"]
        dtype = like.dtype if value.is_floating_point() else value.dtype
        made[prefix + name] = value.to(like.device, dtype)
        report.note(report.new, prefix + name, "computed from the grid")
    return Converted(made, report)


def from_stage(weights: Mapping[str, Tensor], family: Family | None = None) -> Converted:
    """Renames a student in training (`trunk.*` beside a masked model's head, or `model.*`) to ours. `family` is that of
    `weights`, if known."""
    expect_scheme(weights, "stage", family=family)
    made, masked = {}, {}
    for name, value in weights.items():
        if name.startswith(("trunk.", "model.")):
            made[name.partition(".")[2]] = value
        else:
            masked[name] = value
    return Converted(made, KeyReport(loaded=[*made, *masked]), masked)


def visual_trunk(weights: Mapping[str, Tensor], family: Family | None = None) -> Converted:
    """Returns the timm model inside an open_clip model. `family` is that of `weights`, if known."""
    family = expect_scheme(weights, "open_clip", family=family)
    report, made = KeyReport(), {}
    for name, value in weights.items():
        if family.prefix == TRUNK and name.startswith(TRUNK):
            made[name.removeprefix(TRUNK)] = value
        else:
            report.note(report.ignored, name, "outside the image tower's timm model")
    if not made:
        raise UserError("checkpoint: this open_clip model has no timm model as image tower (no visual.trunk.*)")
    report.loaded += list(made)
    return Converted(made, report)


def with_norm(weights: Mapping[str, Tensor], rule: NormRule, into: Literal["fc_norm", "norm"] = "fc_norm") -> Converted:
    """Returns a trunk whose `norm` is adapted to a classifier that pools patches by their mean and normalises afterwards, by
    `fc_norm`; with `into` norm, the way back.

    `drop` leaves `norm` out, so that `fc_norm` starts fresh (the original fine-tuning). `copy` renames `norm` to `fc_norm`
    (timm). `keep` changes nothing. A trunk without `norm` stays as it is.
    """
    report, made = KeyReport(), {}
    away = "norm" if into == "fc_norm" else "fc_norm"
    here = {name for name in weights if name in (f"{away}.weight", f"{away}.bias")}
    if rule == "copy" and here and f"{into}.weight" in weights:
        raise UserError(f"norm=copy: the trunk has {into} already; set it to keep or drop")
    for name, value in weights.items():
        new = name.replace(away, into, 1)
        if name in here and rule == "drop":
            report.note(report.ignored, name, f"norm=drop: {into} stands in its place")
            if new not in weights:
                report.note(report.new, new, "norm=drop: starts fresh, not in the result")
            continue
        made[new if name in here and rule == "copy" else name] = value
    report.loaded += list(made)
    return Converted(made, report)


def unshare_relative(weights: Mapping[str, Tensor]) -> Converted:
    """Copies a trunk's one table of relative positions to every block (facts, section 6); a trunk without it stays as it is."""
    shared = "rel_pos_bias.relative_position_bias_table"
    made = {name: value for name, value in weights.items() if name != shared}
    report = KeyReport(loaded=list(made))
    if shared in weights:
        report.note(report.ignored, shared, "copied to every block")
        for number in sorted({found[1] for name in weights if (found := split_block(name)) and found[0] == "blocks"}):
            name = f"blocks.{number}.attn.relative_position_bias_table"
            made[name] = weights[shared].clone()
            report.note(report.new, name, f"a copy of {shared}")
    return Converted(made, report)


def expect_scheme(
    weights: Mapping[str, Tensor], *schemes: Scheme, needs: str | None = None, family: Family | None = None
) -> Family:
    """Returns the family of weights; `family` is that family, if known. Raises UserError unless their names follow one of
    `schemes`, and their family is `needs`, if given."""
    family = family or detect(weights)
    if not set(schemes) & set(family.schemes) or needs not in (None, family.name):
        raise UserError(
            f"checkpoint: {family.name} under names of {' and '.join(family.schemes)}; this conversion starts from "
            f"{needs or ''} names of {' or '.join(schemes)}"
        )
    return family


def _fits_eva(family: Family, weights: Mapping[str, Tensor]) -> None:
    """Raises UserError with the parts of a trunk that no model of the original code has."""
    table = block_names(family.qkv, family.mlp).values()
    lacks = []
    for name in weights:
        bare = name.removeprefix(family.prefix)
        found = split_block(bare)
        if found and found[2] not in table:
            lacks.append(f"blocks.N.{found[2]}")
        elif bare.startswith(("patch_embed.backbone.", "patch_embed.norm.")):
            lacks.append(".".join(bare.split(".")[:2]))
        elif bare.startswith(("reg_token", "norm_pre.", "attn_pool.", "visual.head.", "logit_bias")):
            lacks.append(bare)
    if family.mlp == "geglu":
        lacks.append("a GeGLU")
    if family.name == "OpenAI CLIP":
        lacks.append("OpenAI's tower")
    if not family.class_token or (family.positions is not None and family.positions == family.tokens):
        lacks.append("positions without a class token")
    if lacks:
        raise UserError(f"the original EVA code has no place for {few(dict.fromkeys(lacks))}")


def _in_block(name: str, table: Mapping[str, str]) -> str:
    found = split_block(name)
    return f"{found[0]}.{found[1]}.{table[found[2]]}" if found else name


def text_name(name: str) -> str:
    """Returns open_clip's name of a text tower's tensor; the logit scale stands outside the tower (golden README, point 19)."""
    bare = name.removeprefix("text.")
    return bare if bare == "logit_scale" else f"text.{bare}"


def _known(value: Tensor) -> bool:
    """True if the tensor has values, in memory or in a file (`lazy.py`)."""
    return isinstance(value, Tensor) and not value.is_meta


def _equal(one: Tensor, other: Tensor) -> bool:
    return not (_known(one) and _known(other)) or torch.equal(one, other)


def _read_tables(tables: Mapping[str, Tensor]) -> tuple[Rope | None, Grid | None]:
    """Returns the settings and the grid of stored tables. Raises UserError for a table that the original code would not
    compute."""
    rope, grid = None, None
    tables = {name: value for name, value in tables.items() if _known(value)}
    if "rope.freqs_cos" in tables:
        rope, grid = read_rope(materialise(tables["rope.freqs_cos"]), materialise(tables["rope.freqs_sin"]))
    for name, deferred in tables.items():
        value = materialise(deferred)
        if "rope.freqs" in name:
            top = tables.get(name[name.index("rope.") :])
            same = top is not None and torch.equal(value, top)
        elif name == "decoder_pos_embed":
            grid = _grid(value.shape[1] - 1, lambda g, v=value: _close(_decoder_table(g, v.shape[2]), v))  # type: ignore[misc]
            same = grid is not None
        else:
            grid = _grid(len(value) - 1, lambda g, v=value: torch.equal(relative_position_index(g), v.cpu()))  # type: ignore[misc]
            same = grid is not None
        if not same:
            raise UserError(f"checkpoint: {name} is not the original code's table; it cannot be computed again")
    return rope, grid


def _close(made: Tensor, stored: Tensor) -> bool:
    tolerance = 1e-5 if stored.dtype == torch.float32 else 1e-2
    return bool((made - stored.float().cpu()).abs().max() < tolerance)


def _grid(tokens: int, fits: Callable[[Grid], bool]) -> Grid | None:
    grids = ((rows, tokens // rows) for rows in range(1, tokens + 1) if tokens % rows == 0)
    return next((grid for grid in grids if fits(grid)), None)


def _tables(family: Family, outside: Mapping[str, Tensor], grid: Grid | None, rope: Rope | None) -> dict[str, Tensor]:
    """Returns the original code's buffers by name. Raises UserError if a size is missing or does not fit."""
    decoder, relative = "decoder_embed.weight" in outside, family.relative != "none"
    if family.name == "EVA-02" and rope is None:
        raise UserError("rope: EVA-02 stores rotary tables; give the width of a head and the reference grid")
    if not (rope or decoder or relative):
        return {}
    if grid is None or family.tokens not in (None, grid[0] * grid[1]):
        raise UserError(f"grid: {grid} is not the grid of {family.tokens} patches; the original code stores tables of it")
    made: dict[str, Tensor] = {}
    if rope is not None:
        for name, value in zip(("freqs_cos", "freqs_sin"), rope_tables(rope, grid), strict=True):
            made |= {f"rope.{name}": value} | {f"blocks.{n}.attn.rope.{name}": value for n in range(family.depth)}
    if relative:
        homes = ["rel_pos_bias"] if family.relative == "shared" else [f"blocks.{n}.attn" for n in range(family.depth)]
        made |= dict.fromkeys((f"{home}.relative_position_index" for home in homes), relative_position_index(grid))
    if decoder:
        made["decoder_pos_embed"] = _decoder_table(grid, outside["decoder_embed.weight"].shape[0])
    return made


def _decoder_table(grid: Grid, width: int) -> Tensor:
    if width % 4:
        raise UserError(f"checkpoint: a decoder of width {width} has no sine and cosine positions; they need a multiple of 4")
    return sincos_table(grid, width, 1)
