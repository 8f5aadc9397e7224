"""CLIP image towers as teachers: patch features, by default after the final norm and CLIP's projection
(EVA-01/eva/clip/model.py; EVA-02/asuka/eva_clip/vit_model.py for EVA-CLIP, whose projection has a bias)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import open_clip
import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from safetensors import SafetensorError
from torch import Tensor

from eva_mim.core.contracts import Features
from eva_mim.core.errors import UserError
from eva_mim.core.files import weights_sha256
from eva_mim.core.registry import nearest
from eva_mim.core.run_folder import CLIP_CONFIG, CLIP_WEIGHTS
from eva_mim.teachers.frozen import FrozenTeacher, Reading, block_index, with_projection
from eva_mim.teachers.trunk import EMBEDDING, read_trunk
from eva_mim.trunks.create import create
from eva_mim.trunks.kernels import tune

if TYPE_CHECKING:
    from eva_mim.teachers import TeacherSettings


def open_clip_teacher(settings: TeacherSettings) -> FrozenTeacher:
    """Returns an image tower by open_clip's architecture name, with a pretrained tag or a local weight file. Raises UserError."""
    known = open_clip.list_models()
    if settings.name not in known:
        raise UserError(f"{settings.path}.name: {settings.name!r} is not among open_clip's {len(known)} architectures"
                        f"{nearest(settings.name, known, count=3)}")
    return _teacher(settings, settings.name, settings.weights)


def stage_teacher(settings: TeacherSettings) -> FrozenTeacher:
    """Returns the image tower of a finished clip stage of ours. Raises UserError if the folder does not contain one."""
    if not (Path(settings.name) / CLIP_CONFIG).is_file():
        raise UserError(f"{settings.path}.name: {settings.name} has no {CLIP_CONFIG}; it must be the folder of a finished clip "
                        "stage")
    if not _without_values() and not (Path(settings.name) / CLIP_WEIGHTS).is_file():
        raise UserError(f"{settings.path}.name: {settings.name} has no {CLIP_WEIGHTS}")
    return _teacher(settings, f"local-dir:{settings.name}", None)


class TextTower:
    """The frozen text tower of a teacher that is a CLIP model."""

    def __init__(self, settings: TeacherSettings):
        """Raises UserError for a teacher of another kind, and for a tokenizer that cannot be had."""
        if settings.kind not in ("open_clip", "stage"):
            raise UserError(f"{settings.path}.kind={settings.kind} has no text tower for captions; take a CLIP model (open_clip, "
                            "stage)")
        name = settings.name if settings.kind == "open_clip" else f"local-dir:{settings.name}"
        self._model: Any = _model(settings, name, settings.weights).eval().requires_grad_(False)
        self._model.visual = None
        tune(self._model, "cpu")
        try:
            self.tokenize = open_clip.get_tokenizer(name)
        except (RuntimeError, OSError, ValueError, ImportError) as error:
            raise UserError(f"{settings.path}: the tokenizer of {settings.name}: {error}") from None
        self.width: int = self(self.tokenize([""])).shape[1]

    @torch.no_grad()
    def __call__(self, texts: Tensor) -> Tensor:
        """Returns the embeddings [T, C] of token ids [T, L]."""
        found: Tensor = self._model.encode_text(texts)
        return found

    def to(self, device: Any) -> TextTower:
        """Moves the weights to `device`."""
        self._model.to(device)
        tune(self._model, device)
        return self

    def fingerprint(self) -> str:
        """Returns the SHA-256 of names and values of all weights."""
        return weights_sha256(self._model.state_dict())


def _model(settings: TeacherSettings, name: str, pretrained: str | None, **options: Any) -> Any:
    """Returns open_clip's model. Raises UserError."""
    try:
        device = torch.empty(0).device  # the default device, since open_clip would move a model off the meta device
        with _quiet_if(_without_values()):  # open_clip warns that there are no weights
            return create(name, by=open_clip.create_model, pretrained=pretrained, load_weights=not _without_values(),
                          weights_only=True, device=device, **options)
    except (RuntimeError, OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{settings.path}: {settings.name} with weights {settings.weights}: {error}") from None


def _teacher(settings: TeacherSettings, name: str, pretrained: str | None) -> FrozenTeacher:
    options: dict[str, Any] = {} if settings.side is None else {"force_image_size": settings.side}
    visual = _model(settings, name, pretrained, **options).visual
    size = visual.image_size[0] if isinstance(visual.image_size, tuple) else visual.image_size
    preprocess = getattr(visual, "preprocess_cfg", {})
    return FrozenTeacher(
        visual,
        read_tower(visual, settings),
        settings,
        image_size=size,
        mean=tuple(preprocess.get("mean", open_clip.OPENAI_DATASET_MEAN)),
        std=tuple(preprocess.get("std", open_clip.OPENAI_DATASET_STD)),
    )


@contextmanager
def _quiet_if(quiet: bool) -> Iterator[None]:
    """Suppresses the warnings that libraries log, if `quiet`."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING) if quiet else before)
    try:
        yield
    finally:
        logging.disable(before)


def _without_values() -> bool:
    """Returns whether tensors are made on the meta device, where a file of weights is not read and need not exist."""
    return torch.empty(0).is_meta


def read_tower(visual: Any, settings: TeacherSettings) -> Reading:
    """Returns the reading of open_clip's two kinds of image tower. Raises UserError for towers without patch features."""
    if isinstance(visual, TimmModel):
        if hasattr(visual.head, "pool"):
            raise UserError(f"{settings.path}.name: {settings.name} ends in attention pooling and has no patch features")
        return read_trunk(visual.trunk, settings, visual.head)
    if not isinstance(visual, VisionTransformer):
        raise UserError(f"{settings.path}.name: {settings.name} is a {type(visual).__name__}, which has no patch features")
    if visual.attn_pool is not None or visual.final_ln_after_pool:
        raise UserError(f"{settings.path}.name: {settings.name} has its last norm behind the pooling and no patch features")
    blocks = len(visual.transformer.resblocks)
    layer, project = block_index(settings, blocks), with_projection(settings, visual.proj is not None)

    if settings.summary not in (None, "pooled"):
        raise UserError(f"{settings.path}.summary={settings.summary}: the summary of {settings.name} is its image embedding; "
                        "leave it out")

    def features(images: Tensor) -> Features:
        found = visual.forward_intermediates(
            images, indices=[layer], normalize_intermediates=settings.final_norm, output_fmt="NLC"
        )
        (tokens,) = found["image_intermediates"]
        return Features(found["image_features"], tokens @ visual.proj if project else tokens, visual.grid_size)

    return Reading(features, layer, blocks, settings.final_norm, project, EMBEDDING)
