"""Classifiers: a timm model with its head, and linear probes on a frozen timm model."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from eva_mim.core.files import weights_sha256
from eva_mim.students import ClassifierSettings
from eva_mim.students.norms import GlobalNorm
from eva_mim.trunks import facts
from eva_mim.trunks.create import build_trunk, has_tokens
from eva_mim.trunks.pixels import normalise


class Classifier(nn.Module):
    """A timm model with `classes` outputs; the head's initial weights are scaled by `head_scale`."""

    def __init__(self, settings: ClassifierSettings, classes: int):
        super().__init__()
        options = {"global_pool": settings.global_pool} if has_tokens(settings) else {}
        self.trunk = build_trunk(settings, num_classes=classes, **options)
        self.image_size = facts.image_size(self.trunk, settings)
        self.mean, self.std = facts.mean_std(self.trunk, settings)
        head = self.trunk.get_classifier()  # type: ignore[operator]
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.mul_(settings.head_scale)

    def forward(self, images: Tensor) -> Tensor:
        """Returns [B, K] logits of uint8 images, or of float images (after mixup or cutmix) in 0..255."""
        logits: Tensor = self.trunk(normalise(images, self.mean, self.std))
        return logits

    def timm_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the trunk's tensors among `weights`, under timm's names."""
        return {name.removeprefix("trunk."): value for name, value in weights.items() if name.startswith("trunk.")}


class LinearProbe(Classifier):
    """Linear layers on the pooled features of a frozen trunk, which are standardised without learned scale (EVA 4.4).

    There is one layer for each of `scales`, factors on the learning rate. Layers are trained independently, from equal weights.
    """

    chosen: Tensor
    """Scalar int64: index of the layer that is the result."""

    def __init__(self, settings: ClassifierSettings, classes: int, scales: Sequence[float] = (1.0,)):
        super().__init__(settings, classes)
        self.trunk.requires_grad_(False)
        width: int = self.trunk.num_features  # type: ignore[assignment]
        self.norm = GlobalNorm(width, eps=1e-6, affine=False)  # EVA 4.4
        first = nn.Linear(width, classes)
        nn.init.trunc_normal_(first.weight, std=0.01)
        nn.init.zeros_(first.bias)
        self.heads = nn.ModuleList(deepcopy(first) for _ in scales)
        self.lr_scales = {
            f"heads.{number}.{name}": scale for number, scale in enumerate(scales) for name, _ in first.named_parameters()
        }
        self.register_buffer("chosen", torch.tensor(0))

    def train(self, mode: bool = True) -> LinearProbe:
        """Sets the mode of the layers; the trunk stays in eval mode."""
        super().train(mode)
        self.trunk.eval()
        return self

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Returns [B, D] pooled features of uint8 images, in fp32."""
        tokens = self.trunk.forward_features(normalise(images, self.mean, self.std))  # type: ignore[operator]
        pooled: Tensor = self.trunk.forward_head(tokens, pre_logits=True)  # type: ignore[operator]
        return pooled.float()

    def forward(self, images: Tensor | None = None, *, features: Tensor | None = None) -> Tensor:
        """Returns [B, K, layers] logits of uint8 images, or of their `features` [B, D]; computed in fp32 after the trunk."""
        assert (images is None) != (features is None)
        rows = self.features(images) if images is not None else features
        assert rows is not None
        with torch.autocast(rows.device.type, enabled=False):
            standard = self.norm(rows)
            logits: Tensor = torch.stack([head(standard) for head in self.heads], dim=-1)
        return logits

    def fingerprint(self) -> str:
        """Returns the SHA-256 of names and values of the weights that the features depend on."""
        head = f"{self._timm_head()}."
        return weights_sha256({name: value for name, value in self.trunk.state_dict().items() if not name.startswith(head)})

    def timm_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the trunk's tensors under timm's names, with norm and chosen layer folded into timm's head:
        W (x - m) / s + b = (W / s) x + (b - W m / s)."""
        state, head = super().timm_weights(weights), f"heads.{int(weights['chosen'])}"
        weight = weights[f"{head}.weight"] * (weights["norm.running_var"] + self.norm.eps).rsqrt()
        state[f"{self._timm_head()}.weight"] = weight
        state[f"{self._timm_head()}.bias"] = weights[f"{head}.bias"] - weight @ weights["norm.running_mean"]
        return state

    def _timm_head(self) -> str:
        name = facts.head_name(self.trunk)
        assert name is not None
        return name
