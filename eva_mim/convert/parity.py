"""Parity: a comparison of two models' outputs on the same images. Both run block by block."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image, Resampling
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_pre_hook, register_module_parameter_registration_hook

from eva_mim.core.bands import Bands
from eva_mim.core.errors import UserError
from eva_mim.core.rng import derive
from eva_mim.core.settings import few
from eva_mim.data.source_settings import SceneSettings
from eva_mim.data.sources.folder import FolderSource
from eva_mim.data.sources.scenes import SceneSource
from eva_mim.data.sources.videos import still
from eva_mim.data.views import to_tensor
from eva_mim.trunks.meta import Unfilled
from eva_mim.weights.files.lazy import materialise

BOUNDS = {"float32": 2e-5, "float64": 2e-5, "float16": 1e-2, "bfloat16": 8e-2}
"""dtype of the result -> largest difference, relative to the source's largest absolute value.

Measured on nine ViTs with drawn weights (EVA-01 g, EVA-02 Ti to L, ViT-B and L, BEiT-B, ViTamin-S, CLIP-B), largest output each.
The same weights in another kernel of attention or onnxruntime: up to 1.3e-6; up to 4e-6 with one massive activation and attention
logits four times as large. Weights rounded to float16: 8e-4 to 2e-3 (3e-3); to bfloat16: eight times as much. Mistakes: tanh GELU
3e-4; one bias element off by 1e-2: 3e-4 to 1e-3; v bias dropped: 0.35 to 0.7; RoPE axes swapped: 0.35 to 0.4; a norm's eps of
1e-5 for 1e-6: 8e-6 to 4e-5, which no bound separates from differences of kernels for certain.
"""


@contextmanager
def unloaded() -> Iterator[None]:
    """Makes parameters that modules register inside the context meta tensors; buffers, which constructors compute, stay real.

    A network of any size is then built at once and without memory. Tied parameters stay tied.
    """

    def emptied(_: nn.Module, __: str, value: nn.Parameter) -> nn.Parameter | None:
        return None if value.is_meta else nn.Parameter(torch.empty_like(value, device="meta"), value.requires_grad)

    def tried(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:  # constructors that read a part's output shape
        return tuple(value.to("meta") if isinstance(value, Tensor) else value for value in inputs)

    handles = [
        register_module_parameter_registration_hook(emptied),  # type: ignore[arg-type]  # torch's hint forgets the result
        register_module_forward_pre_hook(tried),  # type: ignore[arg-type]  # as above
    ]
    try:
        with Unfilled():
            yield
    finally:
        for handle in handles:
            handle.remove()


def streamed(module: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """Returns the (unloaded) module, in evaluation mode, with the weights as float32; a block's weights are in memory only while
    the block runs.

    Blocks are the elements of the outermost ModuleLists and Sequentials. Modules outside them (embeddings, norms, heads) are
    loaded at once and stay. Raises UserError unless names and shapes are exactly those of the module's state dict.
    """
    module.float().eval()
    expected = module.state_dict()
    check_fit(type(module).__name__, expected, weights)

    inside: set[str] = set()
    for path, block in _blocks(module):
        if names := [f"{path}.{name}" for name in block.state_dict()]:
            block.register_forward_pre_hook(lambda *_, names=names: _fill(module, names, weights))
            block.register_forward_hook(lambda *_, names=names: _fill(module, names, None), always_call=True)
            _fill(module, names, None)
            inside.update(names)
    _fill(module, [name for name in expected if name not in inside], weights)
    if lost := [name for name, value in module.named_buffers() if value.is_meta and name not in expected]:
        raise UserError(f"{type(module).__name__} cannot be built without its weights, which {few(lost)} need")
    return module


@torch.inference_mode(False)  # parameters made in inference mode lead to another kernel of attention, and other last bits
@torch.no_grad()
def _fill(module: nn.Module, names: list[str], weights: Mapping[str, Tensor] | None) -> None:
    """Loads these parameters and buffers, or empties them if `weights` is None."""
    for name in names:
        path, _, leaf = name.rpartition(".")
        part = module.get_submodule(path)
        old = getattr(part, leaf)
        if weights is None:
            new = torch.empty_like(old, device="meta")
        else:  # into torch's own memory, as load_state_dict does: alignment and strides decide the last bit of a product
            new = torch.empty(old.shape, dtype=old.dtype).copy_(materialise(weights[name]))
        setattr(part, leaf, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)


def _blocks(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    listed = isinstance(module, (nn.ModuleList, nn.Sequential))
    for name, child in module.named_children():
        if listed:
            yield path + name, child
        else:
            yield from _blocks(child, f"{path}{name}.")


def check_fit(model: str, expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Raises UserError unless the weights have the names and shapes of a model's state dict; no value is read."""
    other = {name: value.shape for name, value in expected.items() if name in weights and weights[name].shape != value.shape}
    found = {
        "missing": expected.keys() - weights.keys(),
        "left over": weights.keys() - expected.keys(),
        "of another shape": {f"{name} {list(weights[name].shape)} for {list(shape)}" for name, shape in other.items()},
    }
    if mistakes := [f"{len(names)} {what}: {few(sorted(names))}" for what, names in found.items() if names]:
        raise UserError(f"the weights do not fit the model {model}: {'; '.join(mistakes)}")


@torch.inference_mode()
def outputs(module: Any, images: Tensor, tokens: Tensor | None = None) -> dict[str, Tensor]:
    """Returns the outputs of a model of timm or open_clip for normalised images [B, 3, H, W] and token ids [B, L].

    A model of timm returns `tokens` [B, N, D] (a map for convolutions) after the final norm, and `answer` [B, K or D] if it pools
    or has a head. A model of open_clip returns `image` [B, C] and `text` [B, C], not normalised, `scale` (no longer a logarithm)
    and `bias` of the logits.
    """
    module.eval()
    if not hasattr(module, "encode_image"):
        features = module.forward_features(images)
        answer = module.forward_head(features)
        return {"tokens": features} | ({"answer": answer} if answer.shape != features.shape else {})
    found = {"image": module.encode_image(images), "scale": module.logit_scale.exp()}
    if tokens is not None:
        found["text"] = module.encode_text(tokens)
    return found | ({} if module.logit_bias is None else {"bias": module.logit_bias.detach()})


@dataclass(frozen=True)
class Difference:
    """Difference between two models in one output."""

    shape: tuple[int, ...]
    largest: float
    """Largest absolute difference."""
    source: float
    """Largest absolute value of the source's output."""
    cosine: float
    """Smallest cosine between two vectors along the last axis."""
    broken: tuple[int, int]
    """Number of NaN or infinite values in the source's output, and in the result's."""

    def __str__(self) -> str:
        if any(self.broken):
            return "NaN or infinite: {} numbers of the source, {} of the result".format(*self.broken)
        return f"largest difference {self.largest:.3g} (of {self.source:.3g})  cosine {self.cosine:.6f}"


@dataclass(frozen=True)
class Parity:
    """Differences between the outputs of a source and its result, and their bound."""

    differences: dict[str, Difference]
    bound: float
    """Largest difference allowed, relative to the largest absolute value of the source's output."""
    alone: tuple[str, ...] = ()
    """Outputs that only one of the two models has."""

    def close(self, name: str) -> bool:
        """True if an output is finite and within the bound."""
        found = self.differences[name]
        return not any(found.broken) and found.largest <= self.bound * found.source

    @property
    def passed(self) -> bool:
        """True if every output of both models is finite and within the bound."""
        return all(map(self.close, self.differences))

    def __str__(self) -> str:
        lines = []
        for name, found in self.differences.items():
            verdict = "" if self.close(name) or any(found.broken) else f"  more than {self.bound:g} of it"
            lines.append(f"{name:<8}{list(found.shape)}  {found}{verdict}")
        return "\n".join([*lines, *(f"{name:<8}of one model only: not compared" for name in self.alone)])

    def as_dict(self) -> dict[str, Any]:
        """Returns the figures for a record; numbers that are not finite become None, because JSON lacks them."""
        rows = {name: asdict(found) | {"passed": self.close(name)} for name, found in self.differences.items()}
        for row in rows.values():
            row |= {key: None for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
        return {"passed": self.passed, "bound": self.bound, "outputs": rows, "not_compared": list(self.alone)}


def compare(source: Mapping[str, Tensor], result: Mapping[str, Tensor], *, bound: float) -> Parity:
    """Compares two models' outputs on the same input. Raises UserError if they have none in common, or one of another shape."""
    common = [name for name in source if name in result]
    if not common:
        raise UserError(f"parity: nothing to compare: the source gives {few(source)}, the result {few(result)}")
    for name in common:
        if (one := list(source[name].shape)) != (other := list(result[name].shape)):
            raise UserError(f"parity: {name} is {one} of the source, but {other} of the result: other tokens, or another width")
    alone = tuple(name for name in (*source, *result) if name not in common)
    return Parity({name: _difference(source[name], result[name]) for name in common}, bound, alone)


def _difference(source: Tensor, result: Tensor) -> Difference:
    one, other = (value.double().reshape(value.shape or (1,)) for value in (source, result))
    # Two vectors of zeros have no direction, and count as equal.
    cosine = torch.where((one == other).all(-1), 1.0, F.cosine_similarity(one, other, dim=-1))
    broken = (int((~one.isfinite()).sum()), int((~other.isfinite()).sum()))
    largest = float((one - other).abs().max())
    return Difference(tuple(source.shape), largest, float(one.abs().max()), float(cosine.min()), broken)


def sample_images(size: tuple[int, int], folder: Path | None = None, count: int = 4, channels: int = 3) -> Tensor:
    """Returns the images of a parity check, [B, channels, H, W] uint8 of `size` (H, W), resized bicubically; channels beyond
    three repeat red, green, blue.

    With a folder they are the first readable pictures below it, by path; without one, half drawn scenes and half uniform noise,
    always the same. Raises UserError for a folder without a readable picture.
    """

    def pixels(picture: Image | Bands) -> Tensor:
        colours = to_tensor(picture.resize((size[1], size[0]), Resampling.BICUBIC))
        return colours[[channel % 3 for channel in range(channels)]]

    if folder is None:
        scenes = SceneSource(SceneSettings(size=max(size)), "val")
        drawn = torch.stack([pixels(still(scenes.read(index).image)) for index in range((count + 1) // 2)])
        seeded = torch.Generator().manual_seed(derive(0, "parity images"))
        noise = torch.randint(256, (count - len(drawn), channels, *size), generator=seeded, dtype=torch.uint8)
        return torch.cat([drawn, noise])
    source, read = FolderSource(folder, None), list[Tensor]()
    for index in range(len(source)):
        if len(read) < count:
            with suppress(Exception):  # a file may be broken in any way
                read.append(pixels(still(source.read(index).image)))
    if not read:
        raise UserError(f"{folder}: none of its {len(source)} images can be read")
    return torch.stack(read)


def sample_tokens(context: int, vocabulary: int, count: int = 4) -> Tensor:
    """Returns token ids for a parity check, [count, context] int64, always the same, in CLIP's form: start (the last but one
    id), words, end (the last id, at which the feature is taken), zeros. The texts' lengths range from one word to the whole
    context."""
    seeded = torch.Generator().manual_seed(derive(0, "parity texts"))
    tokens = torch.randint(1, vocabulary - 2, (count, context), generator=seeded)
    tokens[:, 0] = vocabulary - 2
    for row, end in zip(tokens, torch.linspace(2, context - 1, count).long(), strict=True):
        row[end] = vocabulary - 1
        row[end + 1 :] = 0
    return tokens
