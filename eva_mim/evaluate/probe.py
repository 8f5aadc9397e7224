"""Held-out accuracy of a linear probe, of one layer or of several."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from eva_mim.core.batches import FeatureBatch, LabelledBatch
from eva_mim.core.contracts import Autocast
from eva_mim.evaluate.counts import TopCounts
from eva_mim.tasks.probe import logits_of


class ProbeEvaluator:
    """Evaluator of a probe's layers: accuracy over exactly the held-out samples. Of several layers, the one with the best
    accuracy on `select` is the result."""

    headline = "top1"

    def __init__(
        self,
        val: Iterable[LabelledBatch | FeatureBatch],
        select: Iterable[LabelledBatch | FeatureBatch],
        names: Sequence[str],
        *,
        fixed: dict[str, float],
        device: torch.device,
    ):
        self.val, self.select, self.names, self.fixed, self.device = val, select, names, fixed, device

    def __call__(self, student: Any, autocast: Autocast) -> dict[str, float]:
        """Returns `top1` and `top5` in percent and `loss` of the chosen layer, and the figures `fixed`. With several layers also
        `chosen` (the layer's position from 0), and of each layer `top1_NAME` on the held-out images and `select_top1_NAME` on the
        images for the choice."""
        found = {}
        if len(self.names) > 1:
            measured = self._measure(student, autocast, self.select)
            best = max(range(len(self.names)), key=lambda layer: (measured["top1"][layer], -measured["loss"][layer]))
            student.chosen.fill_(best)
            found = {f"select_top1_{name}": value for name, value in zip(self.names, measured["top1"], strict=True)}
        chosen = int(student.chosen)
        measured = self._measure(student, autocast, self.val)
        result = {name: values[chosen] for name, values in measured.items()}
        if len(self.names) > 1:
            result["chosen"] = float(chosen)
            result |= {f"top1_{name}": value for name, value in zip(self.names, measured["top1"], strict=True)}
        return result | found | self.fixed

    def _measure(
        self, student: Any, autocast: Autocast, batches: Iterable[LabelledBatch | FeatureBatch]
    ) -> dict[str, list[float]]:
        """Returns the figures of each layer, over all ranks."""
        counts = TopCounts(self.device, len(self.names))
        for batch in (batch.to(self.device) for batch in batches):
            with autocast():
                logits = logits_of(student, batch)
            labels = batch.labels[:, None].expand(-1, len(self.names))
            counts.add(logits, batch.labels, F.cross_entropy(logits, labels, reduction="none").sum(0))
        return counts.figures()
