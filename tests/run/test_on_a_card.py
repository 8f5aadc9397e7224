"""Whole runs of the stage programs as one of eight processes with a GPU that is pretended: see `tests/pretended.py`.

Training with DeepSpeed, figures, log lines, checkpoints, resume and export are the real ones. Of a GPU's arithmetic and speed
nothing is seen here: that is what `tools/gpu_check` is for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from eva_mim.core.distributed import all_gather_rows
from eva_mim.run.meter import Meter
from eva_mim.run.signals import Agreement
from tests.pretended import as_rank_of_eight
from tests.ranks import Pool
from tests.tiny import CLASSIFY, CLIP, MIM, MODULES, SCENES, losses, run, same_weights, stopped_after, write_recipe

pytestmark = pytest.mark.slow
ENGINE = {"engine": "deepspeed", "global_batch": 48, "checkpoint_every": 2}
"""Two steps an epoch, each of two micro-batches of 3 images a rank."""


def on_a_card(function: Any, *arguments: Any) -> tuple[dict[str, int], list[int]]:
    """Of a program that ends well in a process of its own, in which libraries may be changed: how often each collective was
    called, and the waits of each step."""
    fresh = Pool(1)
    try:
        outcome, = fresh(function, *arguments)
    finally:
        fresh.close()
    assert not outcome.failed, outcome.out + outcome.err
    code, seen, waits = outcome.value
    assert code == 0, outcome.out + outcome.err
    return seen, waits


def recipe_of(folder: Path, tree: dict[str, Any], **run: Any) -> Path:
    return write_recipe(folder, tree | {"run": tree["run"] | ENGINE | {"micro_batch": 3} | run})


SIGLIP = CLIP | {"contrastive": {"kind": "siglip"}, "student": CLIP["student"] | {"init_logit_bias": -10.0}}
CASES = [
    ("mim", MIM, {"ema_decay": 0.9}, 0),
    ("clip", CLIP, {}, 0),
    ("classify", CLASSIFY | {"mix": {"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1}}, {"micro_batch": 6, "ema_decay": 0.9}, 2),
    pytest.param("mim", MIM, {}, 3, marks=pytest.mark.long),
    pytest.param("clip", SIGLIP, {}, 1, marks=pytest.mark.long),
]


@pytest.mark.parametrize(("program", "tree", "settings", "zero_stage"), CASES)
def test_a_run_goes_through_and_goes_on(
    program: str, tree: dict[str, Any], settings: dict[str, Any], zero_stage: int, tmp_path: Path
) -> None:
    """Every tensor of a collective lies on the rank's card, and no step waits for it, but for DeepSpeed's ZeRO, which decides on
    the host whether an update is made. From a checkpoint in the middle the run ends with the same bits. (With ZeRO 1 and 2 the
    other ranks' parts are not known here, so that no checkpoint holds what was trained.)"""
    recipe, straight, resumed = recipe_of(tmp_path, tree, zero_stage=zero_stage, **settings), tmp_path / "a", tmp_path / "b"
    seen, waits = on_a_card(as_rank_of_eight, MODULES[program], [str(recipe), "--out", str(straight)])
    assert {"allreduce_", "broadcast_"} <= seen.keys()
    assert waits == [min(1, zero_stage)] * 4
    if zero_stage in (0, 3):
        stopped_after(2, straight, resumed)
        on_a_card(as_rank_of_eight, MODULES[program], [str(recipe), "--out", str(resumed)])
        assert losses(resumed) == losses(straight)
        same_weights(resumed / "model.safetensors", straight / "model.safetensors")


def with_own_rows(words: list[str]) -> Any:
    """A probe whose cached features are those of this rank, since the others write none."""
    alone = "eva_mim.data.store.write"
    with patch(f"{alone}.world_size", lambda: 1), patch(f"{alone}.run_on", lambda work, mine: {0: work()} if mine else {}):
        return as_rank_of_eight("finetune.probe", words)


@pytest.mark.parametrize("cached", [True, False])
def test_a_probe(cached: bool, tmp_path: Path) -> None:
    """Of several layers, on features computed once, and in each step."""
    run("classify", write_recipe(tmp_path, CLASSIFY, "parent.yaml"), tmp_path / "parent")
    tree = CLASSIFY | {"init_from": str(tmp_path / "parent"), "probe": {"lrs": [0.01, 0.1], "cached": cached},
                       "optim": {"lr": 0.1, "weight_decay": 0.0, "clip_grad": None},
                       "data": SCENES | {"scenes": SCENES["scenes"] | {"train": 400}, "max_broken": 1.0}}
    recipe = recipe_of(tmp_path, tree, global_batch=8, micro_batch=1)
    seen, waits = on_a_card(with_own_rows, [str(recipe), "--out", str(tmp_path / "probe")])
    assert seen["allreduce_"]
    assert not any(waits)


def rows_on_the_host(self: Meter, device: torch.device) -> Any:
    """Figures of the log lines, summed where they are read."""
    return METER_ROWS(self, torch.device("cpu"))


def counts_on_the_host(self: Any, batch: Any) -> dict[str, Tensor]:
    """Numbers of hidden patches, as the host knows them."""
    return {"teacher": torch.tensor(3.0)}


def agreement_on_the_host(self: Agreement, device: torch.device) -> None:
    AGREEMENT(self, torch.device("cpu"))


def gathered_on_the_host(tensor: Tensor) -> Tensor:
    return GATHER(tensor.cpu())


METER_ROWS, AGREEMENT, GATHER = Meter.rows, Agreement.__init__, all_gather_rows
FAULTS = {
    "eva_mim.run.meter.Meter.rows": rows_on_the_host,
    "eva_mim.tasks.masked.MaskedFeatures.counts": counts_on_the_host,
    "eva_mim.run.signals.Agreement.__init__": agreement_on_the_host,
    "eva_mim.evaluate.masked.all_gather_rows": gathered_on_the_host,
}


def with_fault(place: str, words: list[str]) -> Any:
    with patch(place, FAULTS[place]):
        return as_rank_of_eight("pretrain.mim", words)


@pytest.mark.parametrize("place", FAULTS)
def test_a_tensor_of_the_host_is_found(place: str, tmp_path: Path) -> None:
    fresh = Pool(1)
    outcome, = fresh(with_fault, place, [str(recipe_of(tmp_path, MIM)), "--out", str(tmp_path / "run")])
    fresh.close()
    assert outcome.failed
    assert "a tensor lies on the CPU, not on cuda:5" in outcome.err
