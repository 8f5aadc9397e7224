"""The proof of a conversion: outputs of the source and of the result on the same images (and texts)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eva_mim.convert.onnx import runner
from eva_mim.convert.parity import BOUNDS, Parity, check_fit, compare, outputs, sample_images, sample_tokens, streamed, unloaded
from eva_mim.convert.timm_filters import under_timms_names
from eva_mim.convert.writers import Model
from eva_mim.core.errors import UserError
from eva_mim.core.run_folder import CLIP_WEIGHTS, HEAD
from eva_mim.trunks.meta import meta_device
from eva_mim.trunks.pixels import normalise
from eva_mim.weights.files.lazy import deferred, materialise
from eva_mim.weights.files.read import open_checkpoint
from eva_mim.weights.files.sidecar import describe
from eva_mim.weights.names import huggingface
from eva_mim.weights.names.translate import NamedCheckpoint, read_source

Run = Callable[[Path, Model, Tensor, Tensor | None], dict[str, Tensor]]
"""Function of (result, Model, normalised images [B, channels, H, W], token ids [B, L] or None) that returns outputs by name."""
HALF = ("float16", "bfloat16")
IMAGES = 4
"""Number of images that both source and result run on."""


@dataclass(frozen=True)
class Proof:
    """Figures of a conversion."""

    parities: dict[str, Parity]
    """Comparisons, by name."""
    answers: list[float] | None = None
    """Cosine between each image's output before and after a change of size or norm; it is reported, not judged. None without a
    change."""

    @property
    def passed(self) -> bool:
        """True if every comparison is within its bound."""
        return all(parity.passed for parity in self.parities.values())


def prove(
    source: NamedCheckpoint, before: Model, after: Model, path: Path, run: Run, *,
    dtype: str | None = None, bound: float | None = None, images: Path | None = None,
) -> Proof:
    """Compares the source, run by its own library if there is one, with the written result, run by `run`.

    A model that was changed (`after` is not `before`) is compared twice, before the change and after it. A model that was rounded
    is also compared with the rounded weights of the source, because rounding could hide a mistake. `bound` applies to the
    comparison with the result; None: by `dtype`. Raises UserError if outputs cannot be compared.
    """
    exact = BOUNDS["float32"]
    bound = bound if bound is not None else BOUNDS.get(dtype or "float32", exact)
    given, later = (_inputs(model, images) for model in (before, after))
    first = _source_outputs(source, before, *given)
    last = run(path, after, *later)
    if after.outside:
        _same_outside(path, after, dtype)
    rounded: dict[str, Parity] = {}
    if dtype in HALF:
        kind = getattr(torch, dtype)
        half = {name: value.to(kind) if value.is_floating_point() else value for name, value in after.weights.items()}
        expected = _outputs(after, *later, half)
        rounded = {f"rounded to {dtype}, and result": compare(expected, _aligned(expected, last), bound=exact)}
    if after is before:
        return Proof({"source and result": compare(first, _aligned(first, last), bound=bound)} | rounded)
    middle, changed = _outputs(before, *given), _outputs(after, *later)
    parities = rounded | {
        "source, and the same under our names": compare(first, _aligned(first, middle), bound=exact),
        "with the change, and the result": compare(changed, _aligned(changed, last), bound=bound),
    }
    key = "answer" if "answer" in middle else "image"
    if key not in middle or middle[key].shape != changed[key].shape:
        return Proof(parities)
    return Proof(parities, [round(float(value), 4) for value in F.cosine_similarity(middle[key], changed[key], dim=-1)])


def _outputs(
    model: Model, images: Tensor, tokens: Tensor | None, weights: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    built = streamed(model.built(), model.weights if weights is None else weights)
    with _runs(model.architecture.name):
        return outputs(built, images, tokens)


@contextmanager
def _runs(model: str) -> Iterator[None]:
    """Turns an error of a forward pass into UserError: a configuration can build a model that holds the weights and fails on
    images (heads that do not divide the width)."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError, AssertionError, ArithmeticError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the forward pass of {model} fails with this configuration: {str(error)[:300]}") from None


def _inputs(model: Model, images: Path | None) -> tuple[Tensor, Tensor | None]:
    """Returns normalised images, and token ids for a model with a text tower."""
    found, text = model.architecture, model.family.text if model.family and model.trunk else None
    sampled = sample_images(found.image_size, images, IMAGES, channels=len(found.mean))
    pixels = normalise(sampled, found.mean, found.std)
    return pixels, sample_tokens(text.context, text.vocabulary, IMAGES) if text else None


def _source_outputs(source: NamedCheckpoint, model: Model, images: Tensor, tokens: Tensor | None) -> dict[str, Tensor]:
    raw = deferred(source.checkpoint)
    if source.scheme == "transformers":
        return _transformers_outputs(source.description.config, raw, images, tokens)
    return _outputs(model, images, tokens, under_timms_names(raw, model.built()) if source.scheme == "eva" else None)


def reopened(path: Path, model: Model, images: Tensor, tokens: Tensor | None) -> dict[str, Tensor]:
    """Returns the outputs of a result in timm's or open_clip's model; the original code's names are read by timm's own
    loaders."""
    found = read_source(path / CLIP_WEIGHTS if model.trunk and path.is_dir() else path)
    if found.scheme == "eva":
        return _outputs(model, images, tokens, under_timms_names(deferred(found.checkpoint), model.built()))
    return _outputs(model, images, tokens, found.weights if model.trunk else found.trunk().weights)


def by_transformers(path: Path, model: Model, images: Tensor, tokens: Tensor | None) -> dict[str, Tensor]:
    """Returns the outputs of a folder of transformers, run by that library."""
    return _transformers_outputs(describe(path).config, deferred(open_checkpoint(path)), images, tokens)


def by_onnxruntime(path: Path, model: Model, images: Tensor, tokens: Tensor | None) -> dict[str, Tensor]:
    """Returns the outputs of a graph, run by onnxruntime."""
    return runner(path)(images, tokens)


def _transformers_outputs(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], images: Tensor, tokens: Tensor | None
) -> dict[str, Tensor]:
    with meta_device():  # a configuration may ask for more than the memory holds
        planned = huggingface.build(config)
    check_fit(type(planned).__name__, planned.state_dict(), huggingface.for_module(weights, planned))
    with unloaded():
        module = huggingface.build(config)
    built = streamed(module, huggingface.for_module(weights, module))
    with _runs(type(module).__name__):
        return huggingface.outputs(built, images, tokens)


def _aligned(one: Mapping[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the outputs `other` under the names of `one`: a CLIP tower's `image` is the `answer` of the same tower in timm."""
    names = {"answer": "image", "image": "answer"}
    return {names[name] if name in names and name not in one and names[name] in one else name: value
            for name, value in other.items()}


def _same_outside(path: Path, model: Model, dtype: str | None) -> None:
    """Raises UserError unless mask token and head of a masked model were written bit for bit."""
    written = deferred(open_checkpoint(path / HEAD)) if path.is_dir() else read_source(path).outside
    for name, value in model.outside.items():
        wanted = materialise(value)
        wanted = wanted.to(getattr(torch, dtype)) if dtype and wanted.is_floating_point() else wanted
        if name not in written or not torch.equal(materialise(written[name]), wanted):
            raise UserError(f"{path}: {name} was not written as it is in the source; nothing was written")
