"""What an engine says of a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from eva_mim.engine import step


def test_emulated_precision_is_told_by_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which a product takes 6 s in bf16 and 0.5 s in fp32, at best."""
    taken = {torch.bfloat16: [9.0, 6.0, 7.0], torch.float32: [0.5, 1.0, 4.0]}
    now, made = [0.0], torch.ones

    def ones(*sizes: int, dtype: torch.dtype) -> Any:
        class Product:
            def __matmul__(self, other: Any) -> None:
                now[0] += taken[dtype].pop(0)

        assert made(*sizes, dtype=dtype).ndim == 2
        return Product()

    monkeypatch.setattr(step.torch, "ones", ones)
    monkeypatch.setattr(step.time, "perf_counter", lambda: now[0])
    cpu = torch.device("cpu")
    assert step.slowdown("bf16", cpu) == 12.0
    assert step.slowdown("fp32", cpu) == 1.0
    assert step.slowdown("bf16", torch.device("cuda")) == 1.0
