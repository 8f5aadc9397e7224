"""Building the timm model inside a student."""

from __future__ import annotations

import difflib
from typing import Any

import timm
import torch
from torch import nn

import eva_mim.students.small  # noqa: F401  (makes our small architectures known to timm)
from eva_mim.config import UserError
from eva_mim.students import TrunkSettings


def build_trunk(settings: TrunkSettings, **options: Any) -> nn.Module:
    """A timm model. Raises UserError for an unknown name or arguments that this architecture does not take."""
    check_name(settings.name)
    arguments = settings.timm_options() | options
    if settings.drop_path:
        arguments["drop_path_rate"] = settings.drop_path
    try:
        trunk: nn.Module = timm.create_model(settings.name, **arguments)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"student: timm cannot build {settings.name} with {arguments}: {error}") from None
    if settings.grad_checkpointing:
        trunk.set_grad_checkpointing()  # type: ignore[operator]
    return trunk


def check_name(name: str) -> None:
    """Raises UserError, with the nearest names, for an architecture that timm does not know."""
    if name not in timm.list_models():
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise UserError(f"student.name: timm has no {name!r}; near: {', '.join(near) or 'nothing'}")


def has_tokens(settings: TrunkSettings) -> bool:
    """The architecture works on patch tokens (and so has a choice of pooling). Builds nothing: meta device."""
    check_name(settings.name)
    with torch.device("meta"):
        return hasattr(timm.create_model(settings.name), "num_prefix_tokens")


def input_size(trunk: nn.Module, settings: TrunkSettings) -> int:
    """Side of the trunk's input in pixels."""
    config: Any = trunk.pretrained_cfg
    return int(settings.image_size or config["input_size"][-1])


def mean_std(trunk: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The architecture's own mean and std."""
    config: Any = trunk.pretrained_cfg
    return tuple(config["mean"]), tuple(config["std"])


def use_fused_attention(module: nn.Module, fused: bool) -> None:
    """Choose the attention kernel of every timm attention layer below `module`.

    On CPUs the explicit product is 1.3 to 7 times faster in training than the fused kernel; on CUDA the fused one is.
    """
    for layer in module.modules():
        if isinstance(getattr(layer, "fused_attn", None), bool):
            layer.fused_attn = fused  # type: ignore[assignment]
