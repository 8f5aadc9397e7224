"""What prediction and target have to do with each other, patch by patch: EVA's cosine, and squared error."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from eva_mim.contracts import StepOutput


def masked_cosine(prediction: Tensor, target: Tensor) -> StepOutput:
    """Loss over [M, C] predictions and targets, mean over patches (EVA-01/eva/engine_for_pretraining.py).

    Always in fp32: squares of half-precision features overflow or vanish. Finite for norms from 1e-8 to 1e4.
    """
    cosine = _cosine(prediction, target)
    return StepOutput(-cosine.mean(), _figures(cosine, target))


def masked_mse(prediction: Tensor, target: Tensor) -> StepOutput:
    """Mean squared error over [M, C] (MAE, section 3, for pixel targets), in fp32."""
    return StepOutput(F.mse_loss(prediction.float(), target.float()), _figures(_cosine(prediction, target), target))


def _cosine(prediction: Tensor, target: Tensor) -> Tensor:
    return (F.normalize(prediction.float(), dim=-1) * F.normalize(target.float(), dim=-1)).sum(-1)


def _figures(cosine: Tensor, target: Tensor) -> dict[str, Tensor]:
    return {"cosine": cosine.detach().mean(), "target_norm": target.detach().float().norm(dim=-1).mean()}
