"""OpenAI's CLIP names, translated to open_clip's and back, and its image tower's to timm's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from eva_mim.core.errors import UserError
from eva_mim.core.report import KeyReport
from eva_mim.core.settings import few
from eva_mim.weights.files.lazy import materialise
from eva_mim.weights.names.eva import Converted, expect_scheme, text_name
from eva_mim.weights.names.families import Family
from eva_mim.weights.names.name_tables import OPENAI_NUMBERS, RESBLOCK, TEXT

_ROOT = {"conv1.weight": "patch_embed.proj.weight", "class_embedding": "cls_token", "positional_embedding": "pos_embed",
         "proj": "head.weight"}
_MODULES = {"ln_pre": "norm_pre", "ln_post": "norm"}
_BLOCK = {"ln_1": "norm1", "ln_2": "norm2", "attn.out_proj": "attn.proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
_STEM = "transformer.resblocks."


def from_openai(weights: Mapping[str, Tensor], family: Family | None = None, *, custom_text: bool = False) -> Converted:
    """Renames OpenAI's CLIP to open_clip's `CLIP`, whose names are as flat, or with `custom_text` to its `CustomTextCLIP`.
    `family` is that of `weights`, if known."""
    expect_scheme(weights, "openai", family=family)
    report, made = KeyReport(), {}
    for name, value in weights.items():
        if name in OPENAI_NUMBERS:
            report.note(report.ignored, name, "a size of the scripted model, read off the shapes")
            continue
        made[text_name(name) if custom_text and TEXT.fullmatch(name) else name] = value
    report.loaded += list(made)
    return Converted(made, report)


def to_openai(weights: Mapping[str, Tensor]) -> Converted:
    """Renames an OpenAI architecture from open_clip's names to OpenAI's flat ones."""
    expect_scheme(weights, "openai", "open_clip", needs="OpenAI CLIP")
    made = {name.removeprefix("text.") if TEXT.fullmatch(name) else name: value for name, value in weights.items()}
    return Converted(made, KeyReport(loaded=list(made)))


def openai_to_timm(weights: Mapping[str, Tensor], family: Family | None = None) -> Converted:
    """Renames OpenAI's image tower to timm's `vit_*_clip_quickgelu_*`: pre-norm, QuickGELU, LayerNorm eps 1e-5, class token,
    head.

    OpenAI's projection, [D, C], is transposed to the head's weight; timm's head has a bias, which is new and zero. `family` is
    that of `weights`, if known.
    """
    expect_scheme(weights, "openai", "open_clip", needs="OpenAI CLIP", family=family)
    report, made = KeyReport(), {}
    for name, value in weights.items():
        if not name.startswith("visual."):
            report.note(report.ignored, name, "outside the image tower")
            continue
        new = _timm_name(name.removeprefix("visual."))
        if new == "cls_token":
            value = value[None, None]
        elif new == "pos_embed":
            value = value[None]
        elif new == "head.weight":
            value = value.T
            made["head.bias"] = torch.zeros(len(value), dtype=value.dtype, device=value.device)
            report.note(report.new, "head.bias", "OpenAI's projection has no bias: zeros")
        made[new] = value
        report.loaded.append(new)
    return Converted(made, report)


def timm_to_openai(weights: Mapping[str, Tensor]) -> Converted:
    """Renames timm's `vit_*_clip_*` back to OpenAI's image tower, below `visual.`.

    Raises UserError for a part that this tower lacks, and for a tensor without a place in it, such as a head's bias that is not
    zero.
    """
    depth = expect_scheme(weights, "timm").depth
    old = [*_ROOT, *(f"{module}.{leaf}" for module in _MODULES for leaf in ("weight", "bias"))]
    old += [f"{_STEM}{number}.{name}" for number in range(depth) for name in RESBLOCK]
    names = {_timm_name(name): name for name in old}
    report, made, lacks = KeyReport(), {}, [f"no {name}" for name in names if name not in weights]
    for name, value in weights.items():
        if name == "head.bias" and not materialise(value).any():
            report.note(report.ignored, name, "zeros: OpenAI's projection has no bias")
        elif name not in names:
            lacks.append(name)
        else:
            value = value[0, 0] if name == "cls_token" else value[0] if name == "pos_embed" else value
            made[f"visual.{names[name]}"] = value.T if name == "head.weight" else value
    if lacks:
        raise UserError(f"not OpenAI's image tower, for it has {few(lacks)}")
    report.loaded += list(made)
    return Converted(made, report)


def _timm_name(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    if not name.startswith(_STEM):
        return _ROOT.get(name) or f"{_MODULES[module]}.{leaf}"
    number, _, rest = name.removeprefix(_STEM).partition(".")
    if rest.startswith("attn.in_proj_"):
        return f"blocks.{number}.attn.qkv.{rest.removeprefix('attn.in_proj_')}"
    module, _, leaf = rest.rpartition(".")
    return f"blocks.{number}.{_BLOCK[module]}.{leaf}"
