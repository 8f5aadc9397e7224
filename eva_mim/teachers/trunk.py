"""Features of timm trunks as teachers.

Plain vision transformers have patch features after any block. Of other trunks (convolutional, hierarchical, ...) the final
output is read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn

from eva_mim.core.contracts import Features
from eva_mim.core.errors import UserError
from eva_mim.teachers.frozen import Reading, block_index, with_projection
from eva_mim.trunks import facts
from eva_mim.trunks.maps import tokens_and_grid

if TYPE_CHECKING:
    from eva_mim.teachers import TeacherSettings


EMBEDDING = "image embedding in the shared space"
"""The summary of a CLIP model, in words."""


def read_trunk(trunk: Any, settings: TeacherSettings, behind: nn.Sequential | None = None) -> Reading:
    """Returns the reading of a timm trunk; `behind` are the layers after it in an open_clip tower, where the trunk's classifier
    is part of the projection. Raises UserError for settings that do not fit the trunk."""
    if isinstance(trunk, VisionTransformerSAM):
        return _read_sam(trunk, settings)
    # Attention pooling projects one vector an image; its projection does not apply to patches.
    pools = getattr(trunk, "attn_pool", None) is not None
    available = behind is not None and not pools and (trunk.num_classes > 0 or len(behind) > 0)
    project = with_projection(settings, available)

    def head(output: Tensor, project: bool) -> Tensor:
        pooled: Tensor = trunk.forward_head(output, pre_logits=not project)
        return behind(pooled) if behind is not None and project else pooled

    def summary(output: Tensor) -> Tensor:
        if settings.summary == "class_token":
            return output[:, 0]
        if settings.summary == "mean":
            return tokens_and_grid(output, trunk)[0].mean(1)
        return head(output, behind is not None)

    if settings.summary == "class_token" and getattr(trunk, "cls_token", None) is None:
        raise UserError(f"{settings.path}.summary=class_token: {settings.name} has none; leave it out, or take mean")
    said = {None: EMBEDDING if behind is not None else "pooled", "class_token": "class token", "mean": "mean of the patches"}
    said["pooled"] = said[None]
    blocks = facts.plain_blocks(trunk)
    if blocks is None:
        return _read_end(trunk, settings, lambda output: head(output, project), summary, project, said[settings.summary])
    layer = block_index(settings, blocks)
    norm = trunk.fc_norm if isinstance(trunk.norm, nn.Identity) else trunk.norm  # fc_norm: norm after the pooling

    def features(images: Tensor) -> Features:
        output, (cells,) = trunk.forward_intermediates(images, indices=[layer], norm=False)
        tokens = cells.flatten(2).transpose(1, 2)
        if settings.final_norm:
            tokens = norm(tokens)
        if behind is not None and project:
            tokens = behind(trunk.head(tokens))
        return Features(summary(output), tokens, (cells.shape[2], cells.shape[3]))

    normed = settings.final_norm and not isinstance(norm, nn.Identity)
    return Reading(features, layer, blocks, normed, project, said[settings.summary])


def _read_sam(trunk: VisionTransformerSAM, settings: TeacherSettings) -> Reading:
    """Returns the reading of SAM's encoder: patches before its neck (AM-RADIO, section 3.3), and no summary."""
    if settings.summary is not None or not settings.final_norm or settings.project:
        raise UserError(f"{settings.path}: {settings.name} is read before its neck and has no summary, norm and projection; "
                        f"leave out {settings.path}.summary, final_norm and project")
    blocks = len(trunk.blocks)
    layer = block_index(settings, blocks)

    def features(images: Tensor) -> Features:
        (cells,) = trunk.forward_intermediates(images, indices=[layer], intermediates_only=True)
        return Features(images.new_zeros(len(images), 0), cells.flatten(2).transpose(1, 2), (cells.shape[2], cells.shape[3]))

    return Reading(features, layer, blocks, final_norm=False, summary=None)


def _read_end(
    trunk: Any, settings: TeacherSettings, head: Callable[[Tensor], Tensor], summary: Callable[[Tensor], Tensor], project: bool,
    said: str,
) -> Reading:
    if settings.layer != -1 or not settings.final_norm:
        raise UserError(
            f"{settings.path}.layer={settings.layer}, {settings.path}.final_norm={str(settings.final_norm).lower()}: "
            f"{settings.name} "
            "has no row of equal blocks and is read at its end alone; leave out both"
        )

    def features(images: Tensor) -> Features:
        output = trunk.forward_features(images)
        tokens, grid = tokens_and_grid(output, trunk)
        return Features(summary(output), per_patch(output, tokens, trunk, head), grid)

    return Reading(features, project=project, summary=said)


def per_patch(features: Tensor, tokens: Tensor, trunk: Any, head: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns [B, N, C], the output of `head` (the trunk's pooling, last norm and projection) for each patch alone.

    Each of the [B, N, D] `tokens` is given to `head` as a map of one cell, or as a sequence of one patch behind copies of itself
    in the places of class and register tokens. `features`, from which the tokens were made, determines the layout.
    """
    batch, count, width = tokens.shape
    single = tokens.reshape(batch * count, 1, width)
    if features.ndim == 4:
        nhwc = getattr(trunk, "output_fmt", "NCHW") == "NHWC"
        single = single.reshape(-1, 1, 1, width) if nhwc else single.reshape(-1, width, 1, 1)
    else:
        single = single.expand(-1, facts.prefix_tokens(trunk) + 1, -1)
    return head(single).reshape(batch, count, -1)
