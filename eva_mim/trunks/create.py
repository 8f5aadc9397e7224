"""Building the timm model inside a student."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from timm.layers import PatchEmbed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import eva_mim.trunks.small  # noqa: F401  (registers our small architectures with timm, for all of eva_mim)
from eva_mim.core.errors import UserError
from eva_mim.core.registry import nearest
from eva_mim.core.run_folder import CLIP_CONFIG, TIMM_CONFIG
from eva_mim.trunks import TrunkSettings, facts, vitamin
from eva_mim.trunks.meta import meta_device
from eva_mim.trunks.positions import sincos_table

LOCAL = "local-dir:"
"""Beginning of a name that stands for a folder, in timm and open_clip."""


def create(name: str, *, by: Callable[..., Any] = timm.create_model, **arguments: Any) -> Any:
    """Returns the model of an architecture name, those in `small.py` included. `by` is timm's or open_clip's function; our
    architectures are registered when this file is imported, and ViTamins of any size by their name. Raises the errors of
    `by`."""
    vitamin.register(_architecture_in(name) if name.startswith(LOCAL) else name)
    return by(name, **arguments)


def _architecture_in(name: str) -> str:
    """Returns the name of the architecture in a folder that timm or open_clip opens; "" if there is none."""
    for file, path in ((CLIP_CONFIG, ("model_cfg", "vision_cfg", "timm_model_name")), (TIMM_CONFIG, ("architecture",))):
        try:
            found: Any = json.loads((Path(name.removeprefix(LOCAL)) / file).read_text())
            for key in path:
                found = found[key]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        return str(found)
    return ""


def build_trunk(settings: TrunkSettings, **options: Any) -> nn.Module:
    """Returns a timm model. Raises UserError for an unknown name, and for arguments that the architecture does not accept."""
    check_name(settings.name)
    arguments = settings.timm_options() | options
    if settings.drop_path:
        arguments["drop_path_rate"] = settings.drop_path
    try:
        trunk: nn.Module = _created(settings.name, **arguments)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"student: timm cannot build {settings.name} with {arguments}: {error}") from None
    _check_patches(trunk, settings)
    if settings.grad_checkpointing:
        trunk.set_grad_checkpointing()  # type: ignore[operator]
    scale_patch_gradient(trunk, settings)
    if settings.positions == "sincos":
        fix_positions(trunk, settings)
    return trunk


def fix_positions(trunk: Any, settings: TrunkSettings) -> None:
    """Sets the trunk's table of positions to fixed sines and cosines, and freezes it. Raises UserError for a trunk without a
    table."""
    table, grid = getattr(trunk, "pos_embed", None), facts.grid(trunk)
    if table is None or grid is None:
        raise UserError(f"student.positions=sincos: {settings.name} has no absolute positions; set it to learned")
    extra = table.shape[1] - grid[0] * grid[1]  # class and register tokens with positions; 0 in some models
    table.data.copy_(sincos_table(grid, table.shape[2], extra))
    table.requires_grad_(False)


def _created(name: str, **arguments: Any) -> nn.Module:
    try:
        found: nn.Module = create(name, **arguments)
    except TypeError as error:  # convolutional networks take any size, and many have no argument for it
        if "img_size" not in arguments or "img_size" not in str(error):
            raise
        del arguments["img_size"]
        found = create(name, **arguments)
    return found


def _check_patches(trunk: nn.Module, settings: TrunkSettings) -> None:
    """Raises UserError for a chosen image size that is no whole number of patches: the last rows and columns would not be
    seen."""
    side, patch = facts.image_size(trunk, settings), facts.patch_size(trunk)
    chosen = settings.image_size is not None or settings.patch_size is not None
    if chosen and isinstance(getattr(trunk, "patch_embed", None), PatchEmbed) and patch and side % patch[0]:
        raise UserError(f"student.image_size={side}: {side} px are not a whole number of patches of {patch[0]} px; the last "
                        f"{side % patch[0]} rows and columns would not be seen. Set it to {side - side % patch[0]} or "
                        f"{side - side % patch[0] + patch[0]}")


def scale_patch_gradient(trunk: nn.Module, settings: TrunkSettings) -> None:
    """Multiplies the gradient of the patch embedding by `patch_grad_scale`; 0 freezes it. Its output does not change.

    Raises UserError for a trunk without patch embedding.
    """
    scale = settings.patch_grad_scale
    if scale == 1:
        return
    embed: Any = getattr(trunk, "patch_embed", None)
    if embed is None:
        raise UserError(f"student.patch_grad_scale={scale}: {settings.name} has no patch embedding; set it to 1")
    if scale == 0:
        embed.requires_grad_(False)
        return

    def scale_output(module: nn.Module, inputs: Any, output: Any) -> None:
        patches: Tensor = output[0] if isinstance(output, tuple) else output  # some patch embeddings also return their grid
        if patches.requires_grad:
            patches.register_hook(lambda gradient: scale * gradient)  # type: ignore[no-untyped-call]

    embed.register_forward_hook(scale_output)


def check_name(name: str, section: str = "student") -> None:
    """Raises UserError, with the most similar names, for an architecture that timm does not have. `section`: path of the settings
    with the name. The tag of pretrained weights after a dot is not checked."""
    if not vitamin.register(name) and name.partition(".")[0] not in timm.list_models():
        raise UserError(f"{section}.name: timm has no {name!r}{nearest(name, timm.list_models(), count=3)}")


def registers_keyword(name: str) -> str:
    """Returns timm's keyword for the number of register tokens of an architecture. Raises UserError for one without."""
    check_name(name)
    with meta_device():
        model = create(name)
    if isinstance(model, Eva):
        return "num_reg_tokens"
    if not isinstance(model, VisionTransformer):
        raise UserError(f"student.registers: {name} has no register tokens; leave it out")
    return "reg_tokens"


def positions_keywords(name: str) -> dict[str, Any]:
    """Returns timm's keywords with which an architecture has a table of positions: none for one that has it anyway."""
    check_name(name)
    with meta_device():
        model = create(name)
    without = isinstance(model, VisionTransformer) and facts.has_seam(model) and not facts.has_positions(model)
    return {"pos_embed": "learn"} if without else {}


def has_tokens(settings: TrunkSettings) -> bool:
    """Returns whether the architecture works on patch tokens, and so has a choice of pooling; it is built on the meta device."""
    check_name(settings.name)
    with meta_device():
        return facts.has_tokens(create(settings.name))
