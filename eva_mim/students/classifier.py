"""Classifiers: a timm model as it is, and a linear probe on a frozen one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eva_mim.pixels import normalise
from eva_mim.students import ClassifierSettings
from eva_mim.students.trunk import build_trunk, has_tokens, input_size, mean_std


class Classifier(nn.Module):
    """A timm model with `classes` outputs; the head starts small."""

    def __init__(self, settings: ClassifierSettings, classes: int):
        super().__init__()
        options = {"global_pool": settings.global_pool} if has_tokens(settings) else {}
        self.trunk = build_trunk(settings, num_classes=classes, **options)
        self.image_size = input_size(self.trunk, settings)
        self.mean, self.std = mean_std(self.trunk)
        head = self.trunk.get_classifier()  # type: ignore[operator]
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.mul_(settings.head_scale)

    def forward(self, images: Tensor) -> Tensor:
        """[B, K] logits of uint8 (or mixed, float 0..255) images."""
        logits: Tensor = self.trunk(normalise(images, self.mean, self.std))
        return logits

    def timm_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The trunk's part of `weights` under timm's names."""
        return {name.removeprefix("trunk."): value for name, value in weights.items() if name.startswith("trunk.")}


class LinearProbe(Classifier):
    """Only a linear layer learns, on pooled features that are standardised without learned scale (EVA 4.4)."""

    def __init__(self, settings: ClassifierSettings, classes: int):
        super().__init__(settings, classes)
        self.trunk.requires_grad_(False)
        width: int = self.trunk.num_features  # type: ignore[assignment]
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.linear = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def train(self, mode: bool = True) -> LinearProbe:
        """The trunk stays in eval mode."""
        super().train(mode)
        self.trunk.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """[B, K] logits."""
        with torch.no_grad():
            features = self.trunk.forward_features(normalise(images, self.mean, self.std))  # type: ignore[operator]
            pooled = self.trunk.forward_head(features, pre_logits=True)  # type: ignore[operator]
        logits: Tensor = self.linear(self.norm(pooled.float()))
        return logits

    def timm_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The probe folded into timm's own head: W (x - m) / s + b = (W / s) x + (b - W m / s)."""
        state = super().timm_weights(weights)
        scale = (weights["norm.running_var"] + self.norm.eps).rsqrt()
        weight = weights["linear.weight"] * scale
        head = next(name for name, module in self.trunk.named_modules() if module is self.trunk.get_classifier())  # type: ignore[operator]
        state[f"{head}.weight"] = weight
        state[f"{head}.bias"] = weights["linear.bias"] - weight @ weights["norm.running_mean"]
        return state
