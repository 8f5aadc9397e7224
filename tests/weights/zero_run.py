"""One step on some ranks, then DeepSpeed's own checkpoint, and whole weights beside it."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

import eva_mim.trunks.small  # noqa: F401
from eva_mim.core.contracts import Rates
from eva_mim.core.distributed import is_main
from eva_mim.core.losses import LossTerm, StepOutput
from eva_mim.engine import RunSettings, build_engine
from eva_mim.optim import OptimSettings


class Classifier(torch.nn.Module):
    """A tiny trunk with a head."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = timm.create_model("vit_nano_patch4_32", num_classes=3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, 32, 32] -> [B, 3]."""
        logits: torch.Tensor = self.trunk(images)
        return logits


class Squares:
    """The mean square of the logits of random images."""

    def prepare(self, student: torch.nn.Module, batches: list[torch.Tensor]) -> list[torch.Tensor]:
        return batches

    def loss(self, student: torch.nn.Module, batch: torch.Tensor) -> StepOutput:
        return StepOutput({"loss": LossTerm(student(batch).square().mean())}, {})

    def counts(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {}


def save(stage: int, folder: Path, frozen: str | None = None) -> None:
    """Called on every rank. Parameters whose name has `frozen` in it are not trained."""
    torch.manual_seed(0)
    student = Classifier()
    for name, value in student.named_parameters():
        value.requires_grad_(frozen is None or frozen not in name)
    run = RunSettings(epochs=1, global_batch=4, engine="deepspeed", zero_stage=stage, precision="fp32")
    engine = build_engine(student, run, OptimSettings(lr=1e-3, layer_decay=0.8), torch.device("cpu"))
    engine.step(Squares(), [torch.randn(2, 3, 32, 32)], Rates(1e-3, 0.05))
    engine._network.save_checkpoint(str(folder), tag="engine", save_latest=False)
    weights = dict(engine.weights())
    if is_main():
        save_file(weights, folder / "wanted.safetensors")
