"""Heads of a masked student: from its patches to a teacher's spatial features, and from its summary to a teacher's summary."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from eva_mim.core.contracts import Grid
from eva_mim.core.errors import UserError
from eva_mim.core.registry import HEADS, lookup
from eva_mim.students import HeadSettings

SUMMARY = "_summary"
"""A teacher's prediction is called by the teacher's name, its summary's by the name with this ending."""
MIXING_HEADS, MIXING_DEPTH, MIXING_SCALE = 16, 2, 1e-5
"""Attention heads, number and initial layer scale of the blocks before an attention head (C-RADIOv4's configuration)."""


class HeadPlan(NamedTuple):
    """What a student predicts of a teacher, and with which kind of head."""

    spatial: int = 0
    """C, width of its spatial features; 0: they are not predicted."""
    summary: int = 0
    """Width of its summary; 0: it is not predicted."""
    settings: HeadSettings = HeadSettings()
    path: str = "student.head"
    """Path of the head's settings, for messages."""


Plans = int | Mapping[str, HeadPlan]
"""C of the only target, spatial features; or the plans of teachers by name."""


def none(width: int, target: int, settings: HeadSettings) -> nn.Module:
    """Returns nothing between the student and the target: both have the same width, as with an anchor. Raises UserError."""
    if width != target:
        raise UserError(f"a head of kind none leaves the student's width, {width}, and the target has {target}; take linear")
    return nn.Identity()


def linear(width: int, target: int, settings: HeadSettings) -> nn.Module:
    """Returns one linear layer from [M, D] to [M, C]."""
    return nn.Linear(width, target)


def mlp(width: int, target: int, settings: HeadSettings) -> nn.Module:
    """Returns a head with one hidden layer (AM-RADIO, section 3.2)."""
    hidden = settings.width or target
    return nn.Sequential(nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, target))


class ResidualMlp(nn.Module):
    """A head with residual blocks between its first and its last layer (the second version of RADIO's heads)."""

    def __init__(self, width: int, target: int, settings: HeadSettings):
        super().__init__()
        hidden = settings.width or target
        self.first = nn.Linear(width, hidden)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, hidden)) for _ in range(settings.blocks))
        self.last = nn.Sequential(nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, target))

    def forward(self, rows: Tensor) -> Tensor:
        """Returns [M, C] of [M, D]."""
        x: Tensor = self.first(rows)
        for block in self.blocks:
            x = x + block(x)
        out: Tensor = self.last(x)
        return out


class AttentionHead(nn.Module):
    """A head with transformer blocks of its own on all tokens, before the layers of `ResidualMlp` (C-RADIOv4, spatial)."""

    def __init__(self, width: int, target: int, settings: HeadSettings):
        super().__init__()
        if width % MIXING_HEADS:
            raise UserError(f"a head of kind attention has {MIXING_HEADS} attention heads, which {width}, the student's width, "
                            "is no multiple of; take mlp_v2")
        self.mixing = nn.Sequential(*(Block(width, MIXING_HEADS, qkv_bias=True, init_values=MIXING_SCALE)
                                      for _ in range(MIXING_DEPTH)))
        self.rows = ResidualMlp(width, target, settings)

    def forward(self, rows: Tensor) -> Tensor:
        """Returns [M, C] of [M, D] rows of mixed tokens."""
        out: Tensor = self.rows(rows)
        return out


class Heads(NamedTuple):
    """Heads by the name of what they predict."""

    spatial: nn.Module
    """A ModuleDict, or the head of the only target."""
    summary: nn.ModuleDict
    cells: dict[str, int]
    """u^2, cells of the target in a patch, by the target's name ("" for the only one)."""


def build_heads(width: int, summary: int, targets: Plans, settings: HeadSettings) -> Heads:
    """Returns the heads of a student whose patches have width `width` and whose summary has width `summary`: for one unnamed
    target a single head, else a ModuleDict. Raises UserError for an unknown kind, and for a teacher's name that torch does not
    allow."""
    if isinstance(targets, int):
        only = _build(settings, width, targets * settings.upsample**2, "student.head")
        return Heads(only, nn.ModuleDict(), {"": settings.upsample**2})
    for name in targets:
        if not name or "." in name or hasattr(nn.ModuleDict, name):
            raise UserError(f"teachers.{name}: torch does not allow this name; choose another")
    hidden = max(max(plan.spatial, plan.summary) for plan in targets.values())
    spatial, summaries, cells = nn.ModuleDict(), nn.ModuleDict(), dict[str, int]()
    for name, plan in targets.items():
        own = plan.settings if plan.settings.width else plan.settings.model_copy(update={"width": hidden})
        if plan.spatial:
            cells[name] = own.upsample**2
            spatial[name] = _build(own, width, plan.spatial * cells[name], plan.path)
        if plan.summary:  # one vector has nothing to mix
            flat = own.model_copy(update={"kind": "mlp_v2"}) if own.kind == "attention" else own
            summaries[name] = _build(flat, summary, plan.summary, plan.path)
    return Heads(spatial, summaries, cells)


def _build(settings: HeadSettings, width: int, target: int, path: str) -> nn.Module:
    build: Callable[[int, int, HeadSettings], nn.Module] = lookup(HEADS, settings.kind, f"{path}.kind")
    try:
        return build(width, target, settings)
    except UserError as error:
        raise UserError(f"{path}.kind: {error}") from None


def last_layer(head: nn.Module) -> nn.Linear:
    """Returns the last linear layer of a head, into which a normaliser is folded."""
    *_, last = (module for module in head.modules() if isinstance(module, nn.Linear))
    return last


def draw_linear(*modules: nn.Module) -> None:
    """Initialises the linear layers in these modules in place: weights truncated normal (std 0.02), biases 0."""
    for module in modules:
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)


class Patches(NamedTuple):
    """Tokens of a batch, and which patches are predicted from them."""

    tokens: Tensor
    """[B, prefix + N, D]."""
    prefix: int
    grid: Grid
    places: Tensor
    """[M], positions in the flattened [B * N]."""


def predict(
    head: nn.Module, cells: Mapping[str, int], patches: Patches, wanted: Mapping[str, Grid | None] | None = None,
    turns: Mapping[str, Tensor] | None = None,
) -> Tensor | dict[str, Tensor]:
    """Returns [M, C] predictions; for several heads by the target's name. Of a head that is finer than the patches [M * u^2, C],
    the cells of a patch together, row by row; of one with a grid in `wanted` [B * rows * columns, C], all of that grid; of a
    head that is not in `wanted`, if this is given, no rows. `head`, `cells`: see `Heads`; `turns`: [C, C] by the target's name
    (of a single head the only one), by which the predictions are multiplied."""
    turns = turns or {}
    if not isinstance(head, nn.ModuleDict):
        return _predict(head, cells[""], patches, turn=next(iter(turns.values()), None))
    found = {}
    for name, one in head.items():
        if wanted is None or name in wanted:
            found[name] = _predict(one, cells[name], patches, None if wanted is None else wanted[name], turns.get(name))
        else:
            nothing = Patches(patches.tokens[:0], patches.prefix, patches.grid, patches.places[:0])
            found[name] = _predict(one, cells[name], nothing)
    return found


def _predict(head: nn.Module, cells: int, patches: Patches, grid: Grid | None = None, turn: Tensor | None = None) -> Tensor:
    tokens, prefix, own, places = patches
    if isinstance(head, AttentionHead):
        tokens = head.mixing(tokens)
    rows = tokens[:, prefix:]
    rows = rows.flatten(0, 1)[places] if grid is None else resampled(rows, own, grid).flatten(0, 1)
    prediction: Tensor = head(rows) if turn is None else _turned(head, rows, turn, cells)
    return prediction.reshape(prediction.shape[0] * cells, prediction.shape[1] // cells)


def _turned(head: nn.Module, rows: Tensor, turn: Tensor, cells: int) -> Tensor:
    """Returns what a head says, each cell times `turn`, [C, C]. The last layer's weights are multiplied, since they have fewer
    columns than there are patches in a batch."""
    last = last_layer(head)
    prefix = next(f"{name}." if name else "" for name, module in head.named_modules() if module is last)
    with torch.autocast(rows.device.type, enabled=False):
        weight, bias = (turn @ one.view(cells, len(turn), -1) for one in (last.weight, last.bias))
    state = {f"{prefix}weight": weight.flatten(0, 1), f"{prefix}bias": bias.flatten()}
    found: Tensor = functional_call(head, state, (rows,))
    return found


def resampled(features: Tensor, grid: Grid, other: Grid) -> Tensor:
    """Returns features [B, N, C] of a grid, brought to another one by bilinear interpolation, in fp32."""
    if grid == other:
        return features
    maps = features.float().transpose(1, 2).unflatten(2, grid)  # type: ignore[no-untyped-call]
    found: Tensor = functional.interpolate(maps, other, mode="bilinear", antialias=False).flatten(2).transpose(1, 2)
    return found
