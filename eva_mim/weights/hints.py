"""Hints about an architecture beyond names and shapes, from configurations beside the source and from the user, validated
before use: types are checked, numbers are bounded, and keywords that would fetch or read weights are refused."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
from timm.models import build_model_with_cfg

from eva_mim.core.contracts import Grid
from eva_mim.core.errors import UserError
from eva_mim.data import MAX_CHANNELS
from eva_mim.trunks.config import RESIZING
from eva_mim.weights.files.sidecar import Description, at, number, text
from eva_mim.weights.names.buffers import Rope
from eva_mim.weights.names.families import Family
from eva_mim.weights.names.layout import Shape

FORBIDDEN = frozenset(inspect.signature(timm.create_model).parameters) | frozenset(
    inspect.signature(build_model_with_cfg).parameters
) | {"device", "dtype", "features_only"}
"""Keywords that choose the origin of weights or the way a model runs, not its architecture."""
MAX_NUMBER = 65_536
"""Largest value of a keyword; a file may ask for a network of any size."""
MAX_SIDE, MAX_TOKENS, MAX_CONTEXT = 2048, 8192, 1024
"""Largest side of an image in pixels, number of patches or registers, and number of text tokens. A file of megabytes could ask
for terabytes."""
MAX_CROP = 2.0
"""Largest crop_pct; above 1 the image is smaller than its crop."""
CLIP_KEYS = ("embed_dim", "quick_gelu", "custom_text", "init_logit_bias")
Pixels = tuple[float, ...]


@dataclass(frozen=True)
class Hints:
    """Architecture hints from the configurations beside the source; None or empty for a missing one."""

    name: str | None = None
    """timm's name of the architecture."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Keywords for `timm.create_model`."""
    config: dict[str, Any] | None = None
    """open_clip's `model_cfg`."""
    mean: Pixels | None = None
    std: Pixels | None = None
    resizing: dict[str, Any] = field(default_factory=dict)
    """timm's interpolation, crop_pct and crop_mode of held-out images; open_clip's models have those of `config.RESIZING`."""
    heads: int | None = None
    quick_gelu: bool | None = None


@dataclass(frozen=True)
class Requirements:
    """Requirements that the weights, the user and the configurations put on a model."""

    shapes: dict[str, Shape]
    family: Family | None
    arguments: dict[str, Any]
    """The user's keywords, which are never changed."""
    size: tuple[int, int] | None
    """(height, width) of the images in pixels."""
    grid: Grid | None
    rope: Rope | None
    hints: Hints

    @property
    def heads(self) -> int | None:
        """Heads of the image tower: the user's, else those of the position tables, else the configuration's; None if unknown."""
        given = self.arguments.get("num_heads")
        return given if isinstance(given, int) else self.heads_of_tables or self.hints.heads

    @property
    def heads_of_tables(self) -> int | None:
        """Heads for which the relative or rotary position tables of the source were made; None without such tables."""
        if self.family is None:
            return None
        return self.family.heads or (self.family.width // self.rope.head_width if self.rope else None)


def check_requirements(want: Requirements) -> None:
    """Raises UserError for a number of heads that contradicts the source, and for sizes that nobody can run; no value is read."""
    heads, given = want.heads_of_tables, want.arguments.get("num_heads")
    if heads and given not in (None, heads):  # parity cannot see this mistake: source and result would share it
        raise UserError(f"--argument num_heads={given}: the position tables of the source are of {heads} heads; give {heads}")
    family, arguments = want.family, {**want.hints.arguments, **want.arguments}
    sides = want.size or arguments.get("img_size") or 0
    height, width = sides if isinstance(sides, tuple) and len(sides) == 2 else (sides, sides)
    patch = arguments.get("patch_size") or (family.patch[0] if family and family.patch else None)
    tables = [shape[0] for name, shape in want.shapes.items() if name.endswith("relative_position_bias_table")]
    found = {
        "rows of positions": ((family and family.positions) or 0, MAX_TOKENS),
        "registers": ((family and family.registers) or 0, MAX_TOKENS),
        "rows of relative positions": (max(tables, default=0), 4 * MAX_TOKENS),
        "text tokens": (family.text.context if family and family.text else 0, MAX_CONTEXT),
    }
    if isinstance(height, int) and isinstance(width, int):
        found["pixels on a side"] = (max(height, width), MAX_SIDE)
        if isinstance(patch, int) and patch > 0:
            found["patches of an image"] = (height // patch * (width // patch), MAX_TOKENS)
    if over := [f"{count:,} {what} (at most {limit:,})" for what, (count, limit) in found.items() if count > limit]:
        raise UserError(f"checkpoint: more than is converted here: {', '.join(over)}")


def read_hints(found: Description) -> Hints:
    """Returns the hints in configurations of timm, open_clip, transformers and our stages. Raises UserError for hostile ones."""
    model, config = at(found.open_clip, "model_cfg"), None
    student, own = at(found.record, "settings", "student"), at(found.config, "model_args")
    name, arguments = found.architecture, own if isinstance(own, dict) else {}
    if name is None and text(student, "name"):
        name = text(student, "name")
        sizes = {
            "img_size": at(student, "image_size"), "patch_size": at(student, "patch_size"), "in_chans": _channels(student, "mean")
        }
        arguments = {key: value for key, value in sizes.items() if value is not None}
    heads = quick = None
    if hub := found.transformers:  # missing keys have transformers' own defaults
        tower, clip = at(hub, "vision_config") or hub, str(text(hub, "model_type")).startswith("clip")
        heads = number(tower, "num_attention_heads") or 12
        quick = (text(tower, "hidden_act") or ("quick_gelu" if clip else "gelu")) == "quick_gelu"
    if isinstance(model, dict):
        config = read_clip_config(model)
        vision = config["vision_cfg"]
        name = name or text(vision, "timm_model_name")
        if not vision.get("timm_model_name"):
            heads = (number(vision, "width") or 768) // (number(vision, "head_width") or 64)
            quick = config.get("quick_gelu") is True
    places: list[tuple[Any, str]] = [
        (at(found.config, "pretrained_cfg"), ""), (at(found.open_clip, "preprocess_cfg"), ""), (found.preprocessor, "image_"),
        (student, ""),
    ]
    mean, std = (
        next((pixels for tree, stem in places if (pixels := _pixels(tree, stem + key))), None) for key in ("mean", "std")
    )
    return Hints(name, plain(arguments, "config.json: model_args."), config, mean, std, _resizing(found),
                 int(heads or 0) or None, quick)


def _resizing(found: Description) -> dict[str, Any]:
    beside = at(found.config, "pretrained_cfg")
    if not isinstance(beside, dict):
        return dict(RESIZING) if found.open_clip else {}
    crop = number(beside, "crop_pct")
    known = {"interpolation": text(beside, "interpolation"), "crop_mode": text(beside, "crop_mode"),
             "crop_pct": crop if crop and 0 < crop <= MAX_CROP else None}
    return {key: value for key, value in known.items() if value is not None}


def plain(arguments: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Returns keywords for a model whose values are plain, with lists as tuples. Raises UserError for other values."""
    for name, value in arguments.items():
        if name in FORBIDDEN:
            raise UserError(f"{source}{name}: not a size or part of a model; leave it out")
        for item in value if isinstance(value, (list, tuple)) and len(value) <= 100 else [value]:
            if not isinstance(item, (bool, int, float, str, type(None))):
                raise UserError(f"{source}{name}: {str(value)[:60]} is not a plain value")
            if not isinstance(item, (str, type(None))) and not abs(item) <= MAX_NUMBER:
                raise UserError(f"{source}{name}: {str(value)[:60]} is out of bounds; numbers are at most {MAX_NUMBER}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()}


def read_clip_config(model: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the known parts of open_clip's `model_cfg`. Raises UserError for values that are not plain, and for a text tower
    of transformers, which open_clip would fetch."""
    source = "open_clip_config.json: model_cfg."
    config = plain({key: model[key] for key in CLIP_KEYS if key in model}, source)
    for tower in ("vision_cfg", "text_cfg"):
        parts = model[tower] if isinstance(model.get(tower), dict) else {}
        inner = {key: plain(value, f"{source}{tower}.{key}.") for key, value in parts.items() if isinstance(value, dict)}
        config[tower] = plain({key: value for key, value in parts.items() if key not in inner}, f"{source}{tower}.") | inner
    if config["text_cfg"].get("hf_model_name"):
        raise UserError(f"{source}text_cfg.hf_model_name: text towers of transformers are not converted")
    return config


def _channels(tree: Any, name: str) -> int | None:
    """Returns the length of a list of channels; None for other values, and for a list that is empty or too long."""
    values = at(tree, name)
    return len(values) if isinstance(values, list) and 0 < len(values) <= MAX_CHANNELS else None


def _pixels(tree: Any, name: str) -> Pixels | None:
    values = [number(tree, name, channel) for channel in range(_channels(tree, name) or 3)]
    if name.endswith("std") and any(value is not None and value <= 0 for value in values):
        raise UserError(f"{name}: {values} beside the source; a standard deviation is above 0")
    return tuple(value for value in values if value is not None) if None not in values else None
