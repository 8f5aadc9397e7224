"""Facts of a timm model in one file: grid, tokens, patches, input, pixels, head, blocks, and whether it can be masked."""

from __future__ import annotations

from typing import Any

from timm.layers import PatchEmbed
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from eva_mim.core.contracts import Grid
from eva_mim.trunks import TrunkSettings

Pixels = tuple[float, ...]
PLAIN = ("blocks", "norm", "fc_norm", "num_prefix_tokens", "forward_intermediates")
"""Attributes that all plain vision transformers of timm have (VisionTransformer, Eva, Beit, NaFlexVit and their subclasses), and
no other model of timm 1.0.31."""


def grid(trunk: nn.Module) -> Grid | None:
    """Returns (rows, columns) of patches at the input size that the trunk was built for; None if it has no `grid_size`."""
    found = getattr(getattr(trunk, "patch_embed", None), "grid_size", None)
    return (found[0], found[1]) if found else None


def position_grid(trunk: nn.Module) -> Grid | None:
    """Returns (rows, columns) of the trunk's table of positions: its grid, unless it has a larger table."""
    own: Any = getattr(trunk, "position_grid", None)
    return (own[0], own[1]) if own else grid(trunk)


def has_tokens(trunk: nn.Module) -> bool:
    """Returns whether the trunk works on patch tokens, and so has a choice of pooling."""
    return hasattr(trunk, "num_prefix_tokens")


def prefix_tokens(trunk: nn.Module) -> int:
    """Returns the number of class and register tokens in front of the patches."""
    return int(getattr(trunk, "num_prefix_tokens", 0))


def patch_size(trunk: nn.Module) -> tuple[int, int] | None:
    """Returns (height, width) in pixels of the patch convolution's kernel; None if the trunk has none."""
    kernel: Any = getattr(getattr(getattr(trunk, "patch_embed", None), "proj", None), "weight", None)
    return (kernel.shape[2], kernel.shape[3]) if kernel is not None and kernel.ndim == 4 else None


def input_size(trunk: nn.Module) -> tuple[int, int]:
    """Returns (height, width) in pixels of the images that the trunk was built for."""
    size: Any = getattr(getattr(trunk, "patch_embed", None), "img_size", None) or configuration(trunk)["input_size"][1:]
    return size[0], size[1]


def image_size(trunk: nn.Module, settings: TrunkSettings) -> int:
    """Returns the side of the trunk's input in pixels: that of the settings, else the architecture's own."""
    return int(settings.image_size or configuration(trunk)["input_size"][-1])


def mean_std(trunk: nn.Module, settings: TrunkSettings | None = None) -> tuple[Pixels, Pixels]:
    """Returns mean and standard deviation of each channel, of pixels between 0 and 1: the settings', else the architecture's."""
    config = configuration(trunk)
    mean, std = (None, None) if settings is None else (settings.mean, settings.std)
    return mean or tuple(config["mean"]), std or tuple(config["std"])


def configuration(trunk: nn.Module) -> Any:
    """Returns timm's `pretrained_cfg` of the trunk; empty for a module without one."""
    return getattr(trunk, "pretrained_cfg", None) or {}


def head_name(trunk: nn.Module) -> str | None:
    """Returns the name of the classifier among the trunk's modules; None for a trunk that was built without one."""
    head: nn.Module = trunk.get_classifier()  # type: ignore[operator]
    return next((name for name, module in trunk.named_modules() if module is head and name), None)


def width(trunk: nn.Module) -> int:
    """Returns the number of channels of the last features."""
    return int(trunk.num_features)  # type: ignore[arg-type]


def has_seam(trunk: nn.Module) -> bool:
    """Returns whether patch tokens enter the trunk's blocks at one place, behind `patch_embed`, before positions are added."""
    return isinstance(trunk, (VisionTransformer, Eva, Beit)) and grid(trunk) is not None


def has_positions(trunk: nn.Module) -> bool:
    """Returns whether the blocks of a trunk with a seam know where a token stands: by a table, by rotary or by relative
    positions."""
    relative = any("rel_pos" in name or "relative_position" in name for name, _ in trunk.named_parameters())
    return getattr(trunk, "pos_embed", None) is not None or getattr(trunk, "rope", None) is not None or relative


def plain_blocks(trunk: Any) -> int | None:
    """Returns the number of blocks of a plain vision transformer, all of one width; None for any other trunk."""
    return len(trunk.blocks) if all(hasattr(trunk, name) for name in PLAIN) else None


def why_not_masked(trunk: nn.Module, *, pixels_hidden: bool = False) -> str | None:
    """Returns why patches cannot be hidden from the trunk, as the end of a sentence about it; None if they can.

    `pixels_hidden`: patches are hidden before the stem, whose receptive field may then extend beyond a patch.
    """
    if pixels_hidden:
        return None
    if not has_seam(trunk):
        return "is not a plain ViT with patch tokens: its pixels must be hidden; set student.form=pixel_fill"
    if not isinstance(trunk.patch_embed, PatchEmbed):
        return ("is not a plain ViT: its stem looks across patches, so that mask tokens come too late; set "
                "student.form=pixel_fill or masked_conv")
    return None


def why_not_dropped(trunk: nn.Module) -> str | None:
    """Returns why patches cannot be dropped inside the trunk, as the end of a sentence about it; None if they can."""
    return None if isinstance(trunk, (VisionTransformer, Eva)) else "cannot leave out patches"


def patch_drop_returns_index(trunk: nn.Module) -> bool:
    """Returns whether the trunk's patch dropout also returns the index of the kept patches, which gathers rotary positions."""
    return isinstance(trunk, Eva)
