"""Search for the registered architectures of timm that may hold a set of weights, built on the meta device: no memory, little
time."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import timm
from timm.layers import DropPath
from timm.models import model_entrypoint
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from eva_mim.core.contracts import Grid
from eva_mim.core.errors import UserError
from eva_mim.core.registry import nearest
from eva_mim.core.settings import few
from eva_mim.trunks import facts
from eva_mim.trunks.config import RESIZING
from eva_mim.trunks.create import create
from eva_mim.trunks.meta import meta_device
from eva_mim.weights.hints import Hints, Pixels, Requirements
from eva_mim.weights.names.layout import Shape
from eva_mim.weights.names.name_tables import split_block

MAX_MODULES = 10_000
"""Largest number of modules in a model. timm's largest has 1,757; a file may ask for any number, by keywords of any name."""
CLASSES = ("VisionTransformer", "Eva", "Beit")
"""Classes of timm whose architectures are searched."""
HYBRIDS = ("timm.models.vision_transformer_hybrid", "timm.models.vitamin")
"""Modules of architectures with a convolutional stem, which take long to build."""
NORMS = ("norm.weight", "fc_norm.weight", "attn_pool.q.weight")
"""Tensors of a trunk that depend on timm's `global_pool`."""
ANSWERLESS = re.compile(r"_.*|.*init.*|.*drop.*|.*grad_checkpointing|training|p|fused_attn|strict_img_size|output_dict")
"""Module attributes that do not affect inference."""


@dataclass(frozen=True)
class Candidate:
    """A model of timm or, with a configuration, of open_clip."""

    name: str
    arguments: dict[str, Any]
    config: dict[str, Any] | None
    model: nn.Module
    """The model on the meta device."""
    mean: Pixels
    std: Pixels
    resizing: dict[str, Any] = field(default_factory=dict)


def fit(want: Requirements, name: str, arguments: Mapping[str, Any]) -> Candidate:
    """Returns a timm model adapted to the requirements: image size, patch size, place of the norm, reference grid of rotary
    positions.

    Raises UserError unless its names and shapes are exactly those of the weights.
    """
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise UserError(f"timm: {error}") from None
    classifier = getattr(config, "classifier", None)
    head = want.shapes.get(f"{classifier if isinstance(classifier, str) else 'head'}.weight", (0,))
    options = {"num_classes": head[0], **arguments, **want.arguments}
    if want.family and options.get("depth", want.family.depth) != want.family.depth:
        raise UserError(f"checkpoint: {want.family.depth} blocks, but depth={options['depth']}")
    model = on_meta(name, options)
    if changes := {key: value for key, value in _changes(want, model).items() if key not in want.arguments}:
        options |= changes
        model = on_meta(name, options)
    check(want, model, name, "; give the differences with --argument" if want.family else "")
    hints = want.hints if want.hints.name in (None, name) else Hints()
    pixels: Any = model.pretrained_cfg
    own = {key: pixels[key] for key in RESIZING if pixels.get(key) is not None}
    return Candidate(name, options, None, model, hints.mean or tuple(pixels["mean"]), hints.std or tuple(pixels["std"]),
                     own | want.hints.resizing)


def on_meta(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Builds a timm model on the meta device. Raises UserError for arguments that the model does not take."""
    built = 0

    def count(*_: Any) -> None:
        nonlocal built
        built += 1
        if built > MAX_MODULES:
            raise ValueError(f"more than {MAX_MODULES} modules")

    handle = register_module_module_registration_hook(count)
    try:
        with meta_device():
            model: nn.Module = create(name, **arguments)
    except Exception as error:  # a file's arguments can fail in any way
        given = ", ".join(f"{key}={value}" for key, value in arguments.items())
        raise UserError(f"timm cannot build {name} with {given}: {str(error)[:300]}") from None
    finally:
        handle.remove()
    return model


def _changes(want: Requirements, model: Any) -> dict[str, Any]:
    """Returns the keywords that adapt a timm model to the requirements."""
    family, embed, changes = want.family, getattr(model, "patch_embed", None), dict[str, Any]()
    if family is None or embed is None:
        return changes
    names = model.state_dict()
    if want.size and tuple(embed.img_size) != want.size:
        changes["img_size"] = side(want.size)
    if family.patch and facts.patch_size(model) not in (None, family.patch):
        changes["patch_size"] = side(family.patch)
    if [name in want.shapes for name in NORMS] != [name in names for name in NORMS]:
        changes["global_pool"] = _pool(want.shapes)
    if want.rope and getattr(model, "rope", None) is not None:
        grid = facts.grid(model)
        if want.size and family.patch:
            grid = (want.size[0] // family.patch[0], want.size[1] // family.patch[1])
        reference = (want.rope.reference,) * 2 if want.rope.reference else grid
        own = getattr(model.rope, "ref_feat_shape", None)
        if (tuple(own) if own else grid) != reference:
            changes["ref_feat_shape"] = reference
    return changes


def _pool(shapes: Mapping[str, Shape]) -> str:
    """Returns timm's `global_pool` for the place of the norm."""
    if "attn_pool.q.weight" in shapes:
        return "map"
    return "avg" if "fc_norm.weight" in shapes else "token" if "cls_token" in shapes else ""


def side(size: tuple[int, int]) -> int | tuple[int, int]:
    """Returns one number for a square, and (height, width) otherwise."""
    return size[0] if size[0] == size[1] else size


def check(want: Requirements, model: Any, label: str, hint: str = "") -> None:
    """Raises UserError unless the model has exactly the required names and shapes, and the required heads, image size and
    grid, if known."""
    shapes, given = shapes_of(model), dict(want.shapes)
    for scalar in ("logit_scale", "logit_bias"):  # open_clip loads a vector of one as a scalar
        if given.get(scalar) == (1,):
            given[scalar] = ()
    lists = {
        "missing": [key for key in shapes if key not in given],
        "left over": [key for key in given if key not in shapes],
        "of other shapes": [f"{key} {given[key]}, not {own}" for key, own in shapes.items() if given.get(key, own) != own],
    }
    mistakes = [f"{len(keys)} {what} ({few(keys)})" for what, keys in lists.items() if keys]
    size, grid = image_of(model)
    mistakes += [f"a grid of {want.grid}, not {grid}"] if want.grid and want.grid != grid else []
    mistakes += [f"images of {want.size}, not {size}"] if want.size and want.size != size else []
    heads = next((module.num_heads for module in getattr(model, "visual", model).modules() if hasattr(module, "num_heads")), None)
    mistakes += [f"{want.heads} heads, not {heads}"] if want.family and want.heads not in (None, heads) else []
    if mistakes:
        raise UserError(f"checkpoint: the weights are not those of {label}: {'; '.join(mistakes)}{hint}")


def shapes_of(model: nn.Module) -> dict[str, Shape]:
    """Returns the shapes of a model's state dict, by name."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def image_of(model: Any) -> tuple[tuple[int, int], Grid | None]:
    """Returns ((height, width), grid) of the images that a model of timm or open_clip takes."""
    tower = getattr(model, "visual", model)
    trunk = getattr(tower, "trunk", tower)
    embed = getattr(trunk, "patch_embed", trunk)
    size = getattr(embed, "img_size", None) or getattr(embed, "image_size", None) or trunk.pretrained_cfg["input_size"][1:]
    grid = getattr(embed, "grid_size", None)
    return tuple(size), tuple(grid) if grid else None


def search(want: Requirements) -> list[Candidate]:
    """Returns the architectures that fit at their own size; if none does and the image size is known, those that fit at that
    size, or at last those that fit with another patch size as well."""
    own = [{"img_size", "patch_size"}, {"patch_size"}, set[str]()]
    stem, found = _stem(want.shapes), list[Candidate]()
    for kept in own if want.size else own[:1]:
        for name in plausible(want, kept):
            with suppress(UserError):
                if _stem(_probe(name, model_entrypoint(name))) == stem:
                    found.append(fit(want, name, {}))
        if found := [candidate for candidate in found if not kept & candidate.arguments.keys() - want.arguments.keys()]:
            break
    return found


def plausible(want: Requirements, kept: Collection[str]) -> Iterator[str]:
    """Yields timm's names of the searched classes, and names that users registered without a class. Left out are architectures
    with another kind of stem, and those whose name and default input have another `img_size` or `patch_size`, if that is in
    `kept`."""
    family, stem = want.family, "patch_embed.backbone." in "".join(want.shapes)
    assert family
    classes = CLASSES if family.relative == "none" else ("Beit",)
    for name in timm.list_models():
        entry = model_entrypoint(name)
        kind, module = entry.__annotations__.get("return"), entry.__module__
        ours = not module.startswith("timm.")
        if getattr(kind, "__name__", kind) not in classes and (kind or not ours):
            continue
        if not ours and stem != (module in HYBRIDS):
            continue
        if patch := re.search(r"patch(\d+)", name):
            number = int(patch[1])
            if "patch_size" in kept and family.patch != (number, number):
                continue
            if "img_size" in kept and family.tokens and _tokens(name, number) not in (None, family.tokens):
                continue
        yield name


def _tokens(name: str, patch: int) -> int | None:
    """Returns the number of patches of an architecture's default input; None if timm knows none."""
    config = timm.get_pretrained_cfg(name)
    return math.prod(pixels // patch for pixels in config.input_size[1:]) if config else None


@cache
def _probe(name: str, entry: Callable[..., Any]) -> dict[str, Shape]:
    """Returns names and shapes of an architecture, built with one block if it takes a depth."""
    try:
        return shapes_of(on_meta(name, {"depth": 1, "num_classes": 0}))
    except UserError:
        return shapes_of(on_meta(name, {}))


def _stem(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Returns the part of names and shapes that does not depend on depth, input size, patch size, number of classes and
    pooling."""
    kept = {}
    for name, shape in shapes.items():
        found = split_block(name)
        if name.startswith(("norm.", "fc_norm.", "head.", "attn_pool.")) or (found and found[1]):
            continue
        if name == "pos_embed" or name.endswith("relative_position_bias_table"):
            shape = shape[-1:]
        kept[name] = shape[:2] if name == "patch_embed.proj.weight" else shape
    return kept


def choose(want: Requirements, candidates: Iterable[Candidate]) -> Candidate:
    """Returns the first of several candidates that compute the same. Raises UserError if they do not."""
    found = sorted(candidates, key=lambda candidate: (len(candidate.arguments), len(candidate.name), candidate.name))
    if want.hints.quick_gelu is not None:
        found = [candidate for candidate in found if _quick(candidate.model) == want.hints.quick_gelu] or found
    first = _traits(found[0])
    lines = [found[0].name]
    for candidate in found[1:]:
        if different := _differences(first, _traits(candidate)):
            lines.append(f"{candidate.name} ({', '.join(different[:4])})")
    if len(lines) > 1:
        raise UserError(
            "checkpoint: its names and shapes are those of several architectures that do not compute the same; name one with "
            f"--architecture: {', '.join(lines)}"
        )
    return found[0]


def _quick(model: nn.Module) -> bool:
    return any(type(module).__name__ == "QuickGELU" for module in model.modules())


def _traits(candidate: Candidate) -> dict[str, Any]:
    """Returns the properties that outputs depend on besides weights: classes of modules, their plain attributes, mean and std."""
    traits: dict[str, Any] = {"mean": candidate.mean, "std": candidate.std}
    for path, module in candidate.model.named_modules():
        if isinstance(module, (nn.Dropout, nn.Identity, DropPath)):
            continue
        traits[f"{path}.class"] = type(module).__name__
        traits[f"{path}.buffers"] = tuple(sorted(key for key, value in module.named_buffers(recurse=False)))  # a causal mask
        for name, value in vars(module).items():
            chosen = name == "global_pool" and name in candidate.arguments  # a choice of ours, for the place of the norm
            if not chosen and not ANSWERLESS.fullmatch(name) and isinstance(value, (bool, int, float, str, tuple)):
                traits[f"{path}.{name}"] = value
    return traits


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Returns each kind of difference once, whatever the number of blocks."""
    common = one.keys() & other.keys()
    return sorted({f"{path.rpartition('.')[2]} {other[path]}, not {one[path]}" for path in common if one[path] != other[path]})


def check_name(name: str, names: list[str], library: str, source: str) -> None:
    """Raises UserError, with the nearest names, for a name that a library lacks; timm's names may have a tag after a dot."""
    if name.partition(".")[0] not in names:
        raise UserError(f"{source}: {library} has no {name[:100]!r}{nearest(name, names, count=3)}")
