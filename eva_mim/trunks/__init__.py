"""timm models: settings of a trunk, and the towers of a student for tower-wise learning rates. This file imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from eva_mim.core.settings import Settings
from eva_mim.trunks.vitamin import name_of as vitamin_name

if TYPE_CHECKING:
    from torch import nn

Rate = Annotated[float, Field(ge=0.0, lt=1.0)]
SIZES = ("width", "depth", "params")
"""What is said of a student by the name "vitamin"."""


class Tower(NamedTuple):
    """A part of a student that may have a learning rate of its own."""

    module: nn.Module
    """Module with all parameters of the tower."""
    layered: nn.Module
    """Submodule of `module` with the layers; parameters outside it belong to the top layer."""
    layers: Any
    """timm's group matcher for the names in `layered`; None if the layers are not known."""

    @classmethod
    def of_timm(cls, trunk: Any, module: nn.Module | None = None) -> Tower:
        """Returns the tower of a timm model, alone or inside `module`."""
        matcher = trunk.group_matcher(coarse=False) if hasattr(trunk, "group_matcher") else None
        return cls(trunk if module is None else module, trunk, matcher)


class TrunkSettings(Settings):
    """The timm model inside every student."""

    name: str
    """timm's architecture name. `{name: vitamin, width: 512, depth: 12}` is a ViTamin whose third stage has this width and depth,
    `{name: vitamin, params: 100e6}` one with about so many parameters; they are read as `name: vitamin_w512_d12`."""
    image_size: int | None = Field(None, ge=1)
    """Input side in pixels; default the architecture's own."""
    patch_size: int | None = Field(None, ge=1)
    """Patch side in pixels; default the architecture's own."""
    registers: int | None = Field(None, ge=0)
    """Number of tokens behind the class token that belong to no patch (timm counts further class tokens among them); default the
    architecture's own."""
    positions: Literal["learned", "sincos", "cropped"] = "learned"
    """"learned": timm's position table, trained. "sincos": a fixed sine-cosine table, not trained (MAE, EVA-L); a trunk without
    positions (ViTamin-XL) gets one. "cropped", for masked students: a large table, trained, of which each image gets a random
    window (CPE of AM-RADIO), for students of many sizes."""
    drop_path: Rate = 0.0
    """Stochastic depth: the last block's rate, rising linearly from 0 at the first."""
    patch_grad_scale: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    """Factor on the gradient of the patch embedding. EVA-02 uses 0.1 in masked pretraining (modeling_pretrain.py,
    stop_grad_conv1); EVA's classifiers freeze it (0)."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    mean: tuple[Annotated[float, Field(ge=0.0, le=1.0)], ...] | None = None
    """Mean of each channel, of pixels between 0 and 1, as `eva-mim data stats` prints it: as many as `data.channels`. Default the
    architecture's own, of RGB."""
    std: tuple[Annotated[float, Field(gt=0.0, le=1.0)], ...] | None = None
    """Standard deviation of each channel."""

    @model_validator(mode="before")
    @classmethod
    def _a_vitamin_of_any_size(cls, tree: Any) -> Any:
        if not isinstance(tree, dict) or tree.get("name") != "vitamin":
            return tree
        width, depth, parameters = (tree.get(key) for key in SIZES)
        if any(not isinstance(value, (int, float, type(None))) for value in (width, depth, parameters)):
            raise ValueError(f"student.width={width}, student.depth={depth}, student.params={parameters}: expected numbers, such "
                             "as params: 100e+6")
        kept = {name: value for name, value in tree.items() if name not in SIZES}
        return kept | {"name": vitamin_name(width, depth, None if parameters is None else float(parameters))}

    @property
    def channels(self) -> int:
        """Number of channels of an image."""
        return 3 if self.mean is None else len(self.mean)

    def timm_options(self) -> dict[str, Any]:
        """Returns the keyword arguments for `timm.create_model` that describe the architecture."""
        options = {
            "img_size": self.image_size, "patch_size": self.patch_size, "in_chans": None if self.channels == 3 else self.channels
        }
        if self.registers is not None:
            from eva_mim.trunks.create import registers_keyword

            options[registers_keyword(self.name)] = self.registers
        if self.positions == "sincos":
            from eva_mim.trunks.create import positions_keywords

            options |= positions_keywords(self.name)
        return {name: value for name, value in options.items() if value is not None}

    @model_validator(mode="after")
    def _mean_and_std_are_a_pair(self) -> TrunkSettings:
        mean, std = (None if values is None else len(values) for values in (self.mean, self.std))
        if mean != std:
            raise ValueError(f"student.mean has {mean or 'no'} values and student.std {std or 'none'}; give one of each for each "
                             "channel: `eva-mim data stats` prints them")
        return self
