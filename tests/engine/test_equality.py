"""Both engines, and one and two processes, follow the same losses: real DeepSpeed, real gloo.

Here alone all ZeRO stages are compared with one process for whole runs; elsewhere a stage is enough.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import CLIP, MIM, command, losses, records, run, started, write_recipe

pytestmark = pytest.mark.slow

ROUNDING = 2e-5
"""Largest difference of an fp32 loss of order 1 over 8 steps (measured: 9e-8)."""
SHORT = MIM | {"run": MIM["run"] | {"epochs": None, "samples": 120}}
"""Five steps, of which the last is in the second epoch."""


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The local engine's run."""
    folder = tmp_path_factory.mktemp("equality")
    run("mim", write_recipe(folder, SHORT), folder / "local")
    return folder


def test_a_program_under_torchrun_follows_the_local_engine(reference: Path) -> None:
    """As users start it. What is wrong in how ranks find each other, or in how a program builds and ends, shows here."""
    settings = ["run.engine=deepspeed", "run.zero_stage=2", "run.micro_batch=6"]
    done = started(command("mim", reference / "recipe.yaml", reference / "torchrun", *settings, processes=2))
    assert "Traceback" not in done.stderr
    assert losses(reference / "torchrun") == pytest.approx(losses(reference / "local"), abs=ROUNDING)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_two_deepspeed_processes_follow_the_local_engine(reference: Path, zero_stage: int) -> None:
    """Masks hide different numbers of patches, so equal losses also show that the mean is over the global batch."""
    out = reference / f"zero{zero_stage}"
    settings = ["run.engine=deepspeed", f"run.zero_stage={zero_stage}", "run.micro_batch=6"]
    run("mim", reference / "recipe.yaml", out, *settings, processes=2)
    assert losses(out) == pytest.approx(losses(reference / "local"), abs=ROUNDING)
    norms = [[record["grad_norm"] for record in records(folder)] for folder in (out, reference / "local")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    measured, wanted = records(out, "eval")[-1], records(reference / "local", "eval")[-1]
    for name in ("cosine", "cosine_of_mean", "feature_std"):
        assert measured[name] == pytest.approx(wanted[name], abs=2e-4), name
    expected, found = load_file(reference / "local" / "model.safetensors"), load_file(out / "model.safetensors")
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=2e-4, rtol=0)


def test_one_deepspeed_process_and_accumulation_follow_the_local_engine(reference: Path) -> None:
    """No launcher; four micro-batches a step."""
    out = reference / "single"
    run("mim", reference / "recipe.yaml", out, "run.engine=deepspeed", "run.micro_batch=6")
    assert losses(out) == pytest.approx(losses(reference / "local"), abs=ROUNDING)


def test_accumulation_in_the_local_engine_changes_nothing(reference: Path) -> None:
    """Eight micro-batches of three images: the same mean over masked patches."""
    out = reference / "accumulated"
    run("mim", reference / "recipe.yaml", out, "run.micro_batch=3")
    assert losses(out) == pytest.approx(losses(reference / "local"), abs=ROUNDING)


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_contrastive_loss_over_two_processes_is_that_of_one(tmp_path: Path, optimizer: str) -> None:
    """Features are gathered with their gradients: every rank sees the negatives of all. The towers have rates of their own."""
    optim: dict[str, Any] = CLIP["optim"] | {
        "optimizer": optimizer, "image": {"lr": 2e-3, "layer_decay": 0.7}, "text": {"lr": 4e-3, "weight_decay": 0.1},
    }  # fmt: skip
    recipe = write_recipe(tmp_path, CLIP | {"optim": optim, "run": CLIP["run"] | {"epochs": 1}})
    run("clip", recipe, tmp_path / "one")
    stage = {"adamw": 1, "lamb": 0}[optimizer]
    run("clip", recipe, tmp_path / "two", "run.engine=deepspeed", f"run.zero_stage={stage}", processes=2)
    assert losses(tmp_path / "one")[-1] < losses(tmp_path / "one")[0]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=ROUNDING)
