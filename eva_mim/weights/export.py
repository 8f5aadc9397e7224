"""Export of a finished stage: weights under timm's names beside timm's config.json."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eva_mim.core.files import replacing, write_json, write_weights
from eva_mim.core.run_folder import PROGRAM, TIMM_CONFIG, WEIGHTS
from eva_mim.trunks import TrunkSettings, facts
from eva_mim.trunks.config import timm_config


def write_timm(
    out: Path,
    trunk: nn.Module,
    settings: TrunkSettings,
    weights: dict[str, Tensor],
    *,
    classes: tuple[str, ...] | None = None,
    global_pool: str | None = None,
    crop_pct: float = 1.0,
) -> None:
    """Writes `model.safetensors` and the `config.json` with which `timm.create_model("local-dir:OUT", pretrained=True)` opens
    it."""
    write_weights(out / WEIGHTS, weights)
    write_json(out / TIMM_CONFIG, timm_description(trunk, settings, classes=classes, global_pool=global_pool, crop_pct=crop_pct))


def write_program(out: Path, module: nn.Module, weights: dict[str, Tensor], example: Tensor) -> None:
    """Writes a module with these weights as a program of one input, of any number of images or videos, that plain torch runs:
    `torch.export.load(OUT/program.pt2).module()`. `example`: an input, [B > 1, ...] fp32."""
    module = module.cpu().float().eval().requires_grad_(False)
    module.load_state_dict(weights)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own library
        program = torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim("images")},))
        with replacing(out / PROGRAM) as temporary, temporary.open("wb") as file:
            torch.export.save(program, file)  # type: ignore[arg-type]  # any file opened for writing


def timm_description(
    trunk: nn.Module, settings: TrunkSettings, *, classes: tuple[str, ...] | None = None, global_pool: str | None = None,
    crop_pct: float = 1.0,
) -> dict[str, Any]:
    """Returns the `config.json` of a trunk, which may be on the meta device."""
    size = facts.image_size(trunk, settings)
    arguments: dict[str, Any] = settings.timm_options()
    mean, std = facts.mean_std(trunk, settings)
    if global_pool is not None and facts.has_tokens(trunk):
        arguments["global_pool"] = global_pool
    return timm_config(
        settings.name, trunk, arguments, image_size=(size, size), mean=mean, std=std,
        num_classes=len(classes) if classes else 0, labels=classes, resizing={"crop_pct": crop_pct},
    )


def unpooled(trunk: nn.Module) -> str:
    """Returns the `global_pool` with which timm names a ViT's final norm `norm`, as a pretraining stage does."""
    return "token" if getattr(trunk, "cls_token", None) is not None else ""


def part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Returns the tensors below `prefix`, under their names without it."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def grid_of(trunk: nn.Module) -> list[int] | None:
    """Returns the patch grid (rows, columns) of a trunk; None for a trunk without patch tokens."""
    grid = facts.grid(trunk)
    return list(grid) if grid else None
