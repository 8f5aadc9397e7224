"""What a finished stage leaves for others: weights under timm's names with timm's own config, and open_clip's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from eva_mim.core.files import write_json, write_weights
from eva_mim.core.run_folder import TIMM_CONFIG, WEIGHTS
from eva_mim.trunks import TrunkSettings
from eva_mim.trunks.create import mean_std


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
    """`model.safetensors` and the `config.json` with which `timm.create_model("local-dir:OUT", pretrained=True)` opens it."""
    pretrained: Any = trunk.pretrained_cfg
    size = settings.image_size or pretrained["input_size"][-1]
    arguments: dict[str, Any] = settings.timm_options()
    mean, std = mean_std(trunk, settings)
    if global_pool is not None and hasattr(trunk, "num_prefix_tokens"):
        arguments["global_pool"] = global_pool
    config: dict[str, Any] = {
        "architecture": settings.name,
        "num_classes": len(classes) if classes else 0,
        "num_features": trunk.num_features,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [settings.channels, size, size],
            "num_classes": len(classes) if classes else 0,
            "mean": list(mean),
            "std": list(std),
            "interpolation": "bicubic",
            "crop_pct": crop_pct,
            # Where it is named, older versions of timm would start a kernel of other channels than RGB anew.
            "first_conv": pretrained["first_conv"] if settings.channels == 3 else None,
            "classifier": pretrained["classifier"],
            "pool_size": pretrained["pool_size"],
        },
    }
    if classes:
        config["label_names"] = list(classes)
    write_weights(out / WEIGHTS, weights)
    write_json(out / TIMM_CONFIG, config)


def unpooled(trunk: nn.Module) -> str:
    """`global_pool` under which timm keeps a ViT's final norm as `norm`, as a pretraining stage leaves it."""
    return "token" if getattr(trunk, "cls_token", None) is not None else ""


def part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def grid_of(trunk: nn.Module) -> list[int] | None:
    """Patch grid of a trunk with patch tokens, for the record."""
    grid = getattr(getattr(trunk, "patch_embed", None), "grid_size", None)
    return list(grid) if grid else None
