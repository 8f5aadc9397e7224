"""A run goes on exactly under DeepSpeed too, and on any number of processes, with any ZeRO stage, and with the other engine."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from eva_mim.core.run_folder import RunFolder
from tests.run.test_stability import poisoned
from tests.tiny import CLASSIFY, MIM, losses, records, run, run_until, stopped_after, write_recipe

pytestmark = pytest.mark.slow

EVERY_STEP = ["run.checkpoint_every=1", "run.keep_last=99"]
SIX = MIM | {"run": MIM["run"] | {"epochs": None, "samples": 144}}
"""Six steps in place of eight; the first epoch ends after four."""
FROZEN = SIX | {"run": SIX["run"] | {"precision": "bf16", "log_every": 3, "global_batch": 8, "samples": 48},  # slow on CPUs
                "data": SIX["data"] | {"scenes": SIX["data"]["scenes"] | {"train": 32, "val": 8}},
                "student": SIX["student"] | {"patch_grad_scale": 0.0}}
LAMB = SIX | {"optim": SIX["optim"] | {"optimizer": "lamb"}}
PARTS = ("module", "exp_avg", "exp_avg_sq", "counts")
CLOCK = ("time", "images_per_s")
ROUNDING = 1e-5
"""Largest difference of an fp32 loss of order 1."""


def state(out: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return {f"{part}.{name}": value for part in PARTS
            for name, value in load_file(RunFolder(out).checkpoint(step) / f"{part}.safetensors").items()}


def figures(out: Path) -> list[dict[str, Any]]:
    """All records but for starts, without clock times."""
    rows = [row for kind in ("train", "eval") for row in records(out, kind)]
    return [{name: value for name, value in row.items() if not name.startswith(CLOCK)} for row in rows]


@pytest.mark.parametrize(
    ("tree", "settings"),
    [
        (LAMB, ["run.zero_stage=0"]),
        (SIX, ["run.zero_stage=1", "run.micro_batch=6"]),
        (FROZEN, ["run.zero_stage=2"]),
        (FROZEN, ["run.zero_stage=3"]),
        pytest.param(SIX, ["run.zero_stage=0"], marks=pytest.mark.long),
        pytest.param(SIX, ["run.zero_stage=2", "run.micro_batch=6"], marks=pytest.mark.long),
        pytest.param(SIX, ["run.zero_stage=3"], marks=pytest.mark.long),
    ],
)
def test_two_processes_go_on_bit_for_bit(tmp_path: Path, tree: dict[str, Any], settings: list[str]) -> None:
    """Weights, moments and counts, and every figure. Drop path is on. `FROZEN` computes in bf16, a part of the student is frozen,
    and it is stopped in the middle of a log window."""
    recipe = write_recipe(tmp_path, tree | {"student": tree["student"] | {"drop_path": 0.1}})
    settings = ["run.checkpoint_every=2", "run.keep_last=99", "run.engine=deepspeed", *settings]
    run("mim", recipe, tmp_path / "straight", *settings, processes=2)
    again = stopped_after(4, tmp_path / "straight", tmp_path / "again")
    resumed = run("mim", recipe, again, *settings, processes=2)
    assert "going on from step 4" in resumed.stderr
    assert figures(again) == figures(tmp_path / "straight")
    expected, found = state(tmp_path / "straight", 6), state(again, 6)
    assert expected.keys() == found.keys()
    assert not [name for name, value in expected.items() if not torch.equal(found[name], value)]


@pytest.mark.parametrize("zero_stage", [None, 0, *(pytest.param(stage, marks=pytest.mark.long) for stage in (1, 2, 3))])
def test_the_loss_scale_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zero_stage: int | None) -> None:
    """fp16 from a scale that overflows, doubling after three good steps and halved by the next overflow: scale, good steps and
    what is left of forgiveness are those of the undisturbed run, though the process that goes on starts from other ones."""
    monkeypatch.setenv("POISON_WINDOW", "3")
    small = {"precision": "fp16", "global_batch": 4, "epochs": None, "samples": 80, "evaluate_every": 9}  # fp16 is slow on CPUs
    recipe = write_recipe(tmp_path, MIM | {"run": MIM["run"] | small, "evaluate": {"images": 24, "bank": 24}})
    settings = EVERY_STEP if zero_stage is None else [*EVERY_STEP, "run.engine=deepspeed", f"run.zero_stage={zero_stage}"]
    processes = 1 if zero_stage is None else 2
    straight, again = tmp_path / "straight", tmp_path / "again"
    poisoned("none", "mim", recipe, *settings, "--out", straight, processes=processes, scale=2.0**20)
    scales = [row["loss_scale"] for row in records(straight)]
    saved = [int(folder.name.removeprefix("step-")) for folder in sorted((straight / "checkpoints").iterdir())]
    stop = next(step for step in saved if state(straight, step)["counts.loss_scale"][1] == 2)  # two good steps of three
    assert any(after == 2 * before for before, after in pairwise(scales[stop - 1 :]))
    assert any(after == before / 2 for before, after in pairwise(scales))
    stopped_after(stop, straight, again)
    resumed = poisoned("none", "mim", recipe, *settings, "--out", again, processes=processes, scale=2.0**9)
    assert f"going on from step {stop}" in resumed.stderr
    assert figures(again) == figures(straight)
    for step in (step for step in saved if step > stop):
        expected, found = state(straight, step), state(again, step)
        assert not [name for name, value in expected.items() if not torch.equal(found[name], value)]


@pytest.mark.parametrize(
    "places",
    [
        [(3, 2, 6), (1, 2, None), (None, 1, 12), (0, 2, 4), (2, 1, None)],
        pytest.param([(1, 4, None), (3, 2, 6), (2, 1, None), (0, 3, 4), (3, 3, None), (None, 1, 12)], marks=pytest.mark.long),
    ],
)
def test_a_run_wanders(tmp_path: Path, places: list[tuple[int | None, int, int | None]]) -> None:
    """Two steps each on other numbers of processes, with all ZeRO stages and the local engine. Losses, weights and moments are
    those of the undisturbed run of one process within rounding; so every step had the same samples."""
    recipe = write_recipe(tmp_path, MIM | {"run": MIM["run"] | {"epochs": None, "samples": 48 * len(places)}})
    run("mim", recipe, tmp_path / "straight", *EVERY_STEP)
    out = tmp_path / "start"
    for number, (zero_stage, processes, micro_batch) in enumerate(places):
        engine = ["run.engine=local"] if zero_stage is None else ["run.engine=deepspeed", f"run.zero_stage={zero_stage}"]
        micro = [f"run.micro_batch={micro_batch or 'null'}"]
        stop = None if number == len(places) - 1 else 2 * number + 2
        resumed = run_until(stop, "mim", recipe, out, *EVERY_STEP, *engine, *micro, processes=processes)
        assert number == 0 or f"going on from step {2 * number}" in resumed.stderr
    assert losses(out) == pytest.approx(losses(tmp_path / "straight"), abs=ROUNDING)
    for step in range(2, 2 * len(places) + 1, 2):
        expected, found = state(tmp_path / "straight", step), state(out, step)
        assert found["counts.updates"] == step
        for name, value in expected.items():
            scale = value.abs().max().item() if name.startswith("exp_avg") else 1.0
            torch.testing.assert_close(found[name], value, atol=2e-4 * max(scale, 1e-6), rtol=0, msg=f"step {step}: {name}")


def test_log_windows_that_are_cut_by_a_stop_are_whole_again(tmp_path: Path) -> None:
    """A log line of three steps, a checkpoint after four: the means are those of the undisturbed run, in TensorBoard as well,
    where no step appears twice."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = write_recipe(tmp_path, MIM | {"run": MIM["run"] | {"log_every": 3, "evaluate_every": 1}})
    run("mim", recipe, tmp_path / "straight", *EVERY_STEP)
    again = stopped_after(4, tmp_path / "straight", tmp_path / "again")
    run("mim", recipe, again, *EVERY_STEP)
    assert figures(again) == figures(tmp_path / "straight")
    assert [row["step"] for row in records(again)] == [3, 6, 8]
    assert [row["step"] for row in records(again, "eval")] == [4, 8]
    board = EventAccumulator(str(again / "tensorboard")).Reload()
    for kind, wanted in (("train", records(again)), ("eval", records(again, "eval"))):
        name = "loss" if kind == "train" else "cosine"
        shown = [(event.step, event.value) for event in board.Scalars(f"{kind}/{name}")]
        assert shown == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in wanted]


def test_a_stop_is_agreed_within_seconds_though_no_log_line_is_due(tmp_path: Path) -> None:
    """One of two ranks is asked to stop in step 10 of 2,000; the other learns of it 2 s later, not at the next log line."""
    tree = CLASSIFY | {"run": CLASSIFY["run"] | {"epochs": None, "samples": 24 * 2000, "log_every": 2000, "evaluate_every": 999}}
    out = tmp_path / "run"
    run_until(10, "classify", write_recipe(tmp_path, tree), out, "run.engine=deepspeed", "run.checkpoint_every=2000", processes=2)
    (found,) = (int(folder.name.removeprefix("step-")) for folder in (out / "checkpoints").iterdir())
    assert 10 <= found < 400
    assert records(out) == []


def test_what_may_not_differ_is_refused(tmp_path: Path) -> None:
    """The global batch decides which samples make a step."""
    recipe = write_recipe(tmp_path, MIM)
    run("mim", recipe, tmp_path / "run")
    out = stopped_after(4, tmp_path / "run", tmp_path / "again")
    refused = run("mim", recipe, out, "run.global_batch=12", code=2)
    assert "run.global_batch: 24 -> 12" in refused.stderr
