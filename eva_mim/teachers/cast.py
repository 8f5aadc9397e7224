"""Weights of a frozen network in the precision of autocast, cast once instead of in each pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from eva_mim.core.errors import UserError

MODULES = (nn.Linear, NonDynamicallyQuantizableLinear, nn.Conv2d, nn.MultiheadAttention)
"""Modules whose own weights autocast casts; the second is the last layer of the fourth, by which open_clip's towers attend."""


class CastWeights:
    """Casts the weights of a network's linear layers, convolutions and attention when autocast asks for another precision than
    before, which gives the bits that autocast itself gives: it casts weights of frozen networks in every pass. All other weights
    stay as they are. The exact values are kept on the host, and are back before `exact` returns."""

    def __init__(self, network: nn.Module):
        self._own = [(name, parameter) for module_name, module in network.named_modules()
                     if type(module) in MODULES
                     for name, parameter in module.named_parameters(module_name, recurse=False)
                     if not name.endswith(("bias_k", "bias_v"))]  # rows that join keys and values, which no product casts
        self._exact: dict[str, Tensor] = {}
        self._dtype: torch.dtype | None = None

    def follow(self, device: str) -> None:
        """Brings the weights to the precision of autocast on this type of device, or to the exact one without autocast."""
        if device != "meta":  # which has neither values nor autocast
            self._bring(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None)

    def exact(self) -> None:
        """Brings the exact weights back. Raises UserError if the cast ones have changed in between."""
        self._bring(None)

    def _bring(self, dtype: torch.dtype | None) -> None:
        if dtype == self._dtype:
            return
        for name, parameter in self._own:
            value = self._exact.get(name)
            if value is None:
                value = self._exact[name] = parameter.data.to("cpu")
            elif self._dtype is not None and not torch.equal(parameter.data.cpu(), value.to(self._dtype)):
                raise UserError(f"teacher: {name} has changed during the run")
            parameter.data = value.to(parameter.device, dtype or value.dtype)
        if dtype is None:
            self._exact = {}
        self._dtype = dtype
