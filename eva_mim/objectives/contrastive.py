"""CLIP's objective, as open_clip computes it over all ranks."""

from __future__ import annotations

from open_clip.loss import ClipLoss
from torch import Tensor

from eva_mim.contracts import StepOutput
from eva_mim.distributed import rank, world_size


class Contrastive:
    """Each rank compares its own rows with everybody's columns; gathered features carry gradients."""

    def __init__(self) -> None:
        self._loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank(), world_size=world_size())

    def __call__(self, image: Tensor, text: Tensor, scale: Tensor) -> StepOutput:
        """Unit features [B, C] of both sides and the logit scale."""
        loss: Tensor = self._loss(image.float(), text.float(), scale.float())
        return StepOutput(loss, {"logit_scale": scale.detach().float()})
