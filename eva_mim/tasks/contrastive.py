"""Contrastive image-text training over the global batch: open_clip's losses, with gradient caching over micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from eva_mim.core.batches import ImageTextBatch
from eva_mim.core.contracts import Task
from eva_mim.core.distributed import rank, world_size
from eva_mim.core.losses import GradCacheStep, LossTerm, StepOutput
from eva_mim.core.timing import phase
from eva_mim.tasks import ContrastiveSettings

Objective = Callable[..., StepOutput]


class Contrastive:
    """Contrastive loss of a rank's own rows against the columns of all ranks. Gathered features carry gradients, so that the mean
    of the ranks' losses and gradients is that of the global batch (open_clip's local loss with gather-with-gradient)."""

    def __init__(self, settings: ContrastiveSettings | None = None):
        self.settings = settings or ContrastiveSettings()

    def __call__(self, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None = None) -> StepOutput:
        """Returns the loss, computed in fp32, of unit features [B, C] of both towers, the logit scale, and the logit bias if the
        student has one."""
        with torch.autocast(image.device.type, enabled=False):
            loss = self._loss(image.float(), text.float(), scale.float(), None if bias is None else bias.float())
        metrics = {"logit_scale": scale.detach().float()}
        return _output(loss, metrics).with_metrics(logit_bias=None if bias is None else bias.detach().float())

    def _loss(self, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        siglip = self.settings.kind == "siglip"
        part = _sigmoid if siglip else _softmax
        images, texts = image, text
        if world_size() > 1:
            texts = _gathered(text)
            images = images if siglip else _gathered(image)
        own = torch.arange(len(image), device=image.device) + rank() * len(image)
        chunk = self.settings.chunk or len(image)
        total = image.new_zeros(())
        # SigLIP has one term for a pair, so that the rows of images cover all pairs.
        for side, others in [(image, texts)] if siglip else [(image, texts), (text, images)]:
            for rows, partners in zip(torch.split(side, chunk), torch.split(own, chunk), strict=True):
                given = rows, others, scale, bias, partners
                total = total + (part(*given) if chunk >= len(side) else
                                 checkpoint(part, *given, use_reentrant=False, preserve_rng_state=False))
        return total / len(image) / (1 if siglip else 2)


def _gathered(rows: Tensor) -> Tensor:
    """Returns the rows of all ranks [B, C]; their gradients come back summed over the ranks."""
    return torch.cat(all_gather(rows))  # type: ignore[no-untyped-call]


def _softmax(rows: Tensor, others: Tensor, scale: Tensor, bias: Tensor | None, partners: Tensor) -> Tensor:
    """Returns the sum over [b, C] rows of the cross entropy of finding their `partners` among `others` [B, C] (CLIP, Radford et
    al. 2021)."""
    return F.cross_entropy(_logits(rows, others, scale, bias), partners, reduction="sum")


def _sigmoid(rows: Tensor, others: Tensor, scale: Tensor, bias: Tensor | None, partners: Tensor) -> Tensor:
    """Returns the sum over all [b, B] pairs of -log sigmoid(+-logit), with plus for `partners` (SigLIP, Zhai et al. 2023)."""
    logits = _logits(rows, others, scale, bias)
    signs = torch.full_like(logits, -1.0).scatter_(1, partners[:, None], 1.0)
    return -F.logsigmoid(signs * logits).sum()


def _output(loss: Tensor, metrics: dict[str, Tensor]) -> StepOutput:
    return StepOutput({"contrastive": LossTerm(loss)}, metrics)


def _logits(rows: Tensor, others: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    logits = scale * rows @ others.T
    return logits if bias is None else logits + bias


class ImageText(Task):
    """Contrastive training of both towers: each image is matched with its text among the pairs of the global batch. Each of the
    student's predictions of a teacher's embeddings has a loss of its own, 1 - cosine, in each micro-batch."""

    def __init__(self, student: nn.Module, objective: Objective, distilled: Mapping[str, str] | None = None, weight: float = 1.0):
        """`distilled`: by the student's name of a prediction the name of its target in `ImageTextBatch.stored`; `weight`: factor
        on these losses."""
        self.student, self.objective, self.distilled, self.weight = student, objective, dict(distilled or {}), weight

    def prepare(self, student: Callable[..., Any], batches: list[ImageTextBatch]) -> list[ImageTextBatch]:
        """Returns the micro-batches; several of them get a `grad_cache`. A first pass without gradients computes the features of
        all. The loss and its gradient by these features are computed once; each micro-batch then backpropagates its part of that
        gradient (GradCache, Gao et al. 2021)."""
        if len(batches) == 1:
            return batches
        with phase("student"):
            image, text, *scalars = zip(*self._first_pass(student, batches), strict=True)
            said = [torch.cat(image), torch.cat(text), *(same[0] for same in scalars)]
            leaves = [tensor.detach().float().requires_grad_() for tensor in said]
            with torch.autocast(leaves[0].device.type, enabled=False):
                whole = self.objective(*leaves)
                by_image, by_text, *by_scalars = torch.autograd.grad(whole.loss, leaves)
        # The engines average over micro-batches. A row of features belongs to one of them, a scalar to each, so rows are scaled.
        count = len(batches)
        rows = zip(batches, (by_image * count).chunk(count), (by_text * count).chunk(count), strict=True)
        whole = _output(whole.loss.detach(), whole.metrics)
        return [replace(batch, grad_cache=GradCacheStep(whole, (image, text, *by_scalars))) for batch, image, text in rows]

    @torch.no_grad()
    def _first_pass(self, student: Callable[..., Any], batches: list[ImageTextBatch]) -> list[tuple[Tensor, ...]]:
        """Returns the student's outputs for each micro-batch, without gradients. Random state and buffers (running means of batch
        norms) are restored, so that the second pass draws the same numbers and updates buffers once."""
        device = batches[0].images.device
        before = [buffer.clone() for buffer in self.student.buffers()]
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            said = [self._said(student, batch)[0] for batch in batches]
        for buffer, old in zip(self.student.buffers(), before, strict=True):
            buffer.copy_(old)
        return said

    def loss(self, student: Callable[..., Any], batch: ImageTextBatch) -> StepOutput:
        """Returns the loss of this pass. With a `grad_cache` the value of its contrastive term is that of the step, and its
        gradient is this micro-batch's part."""
        with phase("student"):
            said, guesses = self._said(student, batch)
            if batch.grad_cache is None:
                found = self.objective(*said)
            else:
                whole, gradients = batch.grad_cache
                inner = torch.stack([(one.float() * slope).sum() for one, slope in zip(said, gradients, strict=True)]).sum()
                found = _output(whole.loss + (inner - inner.detach()), whole.metrics)
            terms = dict(found.terms)
            for (name, target), guess in zip(self.distilled.items(), guesses, strict=True):
                cosine = F.cosine_similarity(guess.float(), batch.stored[target].float(), dim=-1).mean()
                terms[f"distill_{name}"] = LossTerm(1 - cosine, self.weight, {f"{name}_cosine": cosine.detach()})
            return StepOutput(terms, found.metrics)

    def _said(self, student: Callable[..., Any], batch: ImageTextBatch) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Returns what the contrastive loss is made of, and the predictions of a teacher's embeddings."""
        said = student(batch.images, batch.texts)
        end = len(said) - len(self.distilled)
        return said[:end], said[end:]
