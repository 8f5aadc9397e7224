"""CLIP's softmax loss and SigLIP's sigmoid loss over the pairs of all ranks."""

from __future__ import annotations

import torch
from open_clip.loss import gather_features
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from eva_mim.contracts import StepOutput
from eva_mim.distributed import rank, world_size
from eva_mim.objectives import ContrastiveSettings


class Contrastive:
    """Each rank compares its own rows with everybody's columns; gathered features carry gradients, so that the mean of the
    ranks' losses and gradients is that of the global batch (open_clip's local loss with gather-with-gradient)."""

    def __init__(self, settings: ContrastiveSettings | None = None):
        self.settings = settings or ContrastiveSettings()

    def __call__(self, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None = None) -> StepOutput:
        """Unit features [B, C] of both sides, the logit scale, and the logit bias where the student has one; in fp32."""
        with torch.autocast(image.device.type, enabled=False):
            loss = self._loss(image.float(), text.float(), scale.float(), None if bias is None else bias.float())
        metrics = {"logit_scale": scale.detach().float()}
        return StepOutput(loss, metrics).with_metrics(logit_bias=None if bias is None else bias.detach().float())

    def _loss(self, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        images, texts = image, text
        if world_size() > 1:
            images, texts = gather_features(image, text, gather_with_grad=True, world_size=world_size())
        siglip = self.settings.kind == "siglip"
        part = _sigmoid if siglip else _softmax
        own = torch.arange(len(image), device=image.device) + rank() * len(image)
        chunk = self.settings.chunk or len(image)
        total = image.new_zeros(())
        # SigLIP has one term for a pair: its texts see the images when these see them.
        for side, others in [(image, texts)] if siglip else [(image, texts), (text, images)]:
            for rows, partners in zip(torch.split(side, chunk), torch.split(own, chunk), strict=True):
                given = rows, others, scale, bias, partners
                total = total + (part(*given) if chunk >= len(side) else
                                 checkpoint(part, *given, use_reentrant=False, preserve_rng_state=False))
        return total / len(image) / (1 if siglip else 2)


def _softmax(rows: Tensor, others: Tensor, scale: Tensor, bias: Tensor | None, partners: Tensor) -> Tensor:
    """Sum over [b, C] rows of the cross entropy of finding their partner among all others (CLIP, Radford et al. 2021)."""
    return F.cross_entropy(_logits(rows, others, scale, bias), partners, reduction="sum")


def _sigmoid(rows: Tensor, others: Tensor, scale: Tensor, bias: Tensor | None, partners: Tensor) -> Tensor:
    """Sum over all [b, B] pairs of -log sigmoid(+-logit), plus for partners (SigLIP, Zhai et al. 2023)."""
    logits = _logits(rows, others, scale, bias)
    signs = torch.full_like(logits, -1.0).scatter_(1, partners[:, None], 1.0)
    return -F.logsigmoid(signs * logits).sum()


def _logits(rows: Tensor, others: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    logits = scale * rows @ others.T
    return logits if bias is None else logits + bias
