"""The average of weights against its recurrence, step by step, from the checkpoints of a real run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import CLASSIFY, run, write_recipe


@pytest.mark.slow
@pytest.mark.parametrize("warmup", [True, False])
def test_the_average_follows_its_recurrence(tmp_path: Path, warmup: bool) -> None:
    """a <- d a + (1 - d) w after each step; d is the setting, or rises to it; the first step's weights are the start."""
    out, decay = tmp_path / "run", 0.7
    settings = [f"run.ema_decay={decay}", f"run.ema_warmup={str(warmup).lower()}", "run.checkpoint_every=1", "run.keep_last=9"]
    run("classify", write_recipe(tmp_path, CLASSIFY), out, *settings)
    folders = sorted((out / "checkpoints").iterdir())
    assert len(folders) == 8
    average: dict[str, torch.Tensor] = {}
    for step, folder in enumerate(folders, 1):
        weights = load_file(folder / "module.safetensors")
        found = load_file(folder / "ema.safetensors")
        rate = min(decay, 1 - step ** (-2 / 3)) if warmup else decay
        average = {n: rate * average[n] + (1 - rate) * value for n, value in weights.items()} if average else weights
        for name, value in found.items():
            torch.testing.assert_close(value, average[name], atol=1e-6, rtol=1e-5, msg=f"step {step}: {name}")
