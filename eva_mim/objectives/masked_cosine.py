"""EVA's objective: minus the mean cosine between predicted and target features of the masked patches."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from eva_mim.contracts import StepOutput


def masked_cosine(prediction: Tensor, target: Tensor) -> StepOutput:
    """Loss over [M, C] predictions and targets, mean over patches (EVA-01/eva/engine_for_pretraining.py).

    Always in fp32: squares of half-precision features overflow or vanish. Finite for norms from 1e-8 to 1e4.
    """
    cosine = (F.normalize(prediction.float(), dim=-1) * F.normalize(target.float(), dim=-1)).sum(-1)
    mean = cosine.mean()
    return StepOutput(-mean, {"cosine": mean.detach()})
