"""What is not finite is left out, on all ranks alike; a run finds its way around bad samples, or stops with a dump."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from eva_mim.core.contracts import Rates
from eva_mim.data.sampler import GlobalOrder
from eva_mim.run.stability import SPIKE_PATIENCE, SkipCounter, SkippedData, SpikeAlarm
from tests.tiny import CLASSIFY, CLIP, MIM, finish, losses, python, records, same_weights, stopped_after, write_recipe

BATCH, SAMPLES = 24, 96


def poisoned(
    samples: str, *arguments: str | Path, processes: int = 1, code: int = 0, scale: float | None = None, disk: float = 0.0
) -> subprocess.CompletedProcess[str]:
    """`eva-mim ARGUMENTS` with these samples poisoned, and a disk that takes so many seconds to flush a file."""
    surroundings = {"POISON_DISK": str(disk)} | ({"POISON_SCALE": str(scale)} if scale else {})
    with patch.dict(os.environ, surroundings):
        return finish(python("tests.poison", samples, *arguments, processes=processes), code)


def recipe(folder: Path, **run: Any) -> Path:
    """The tiny masked stage: 4 steps an epoch."""
    return write_recipe(folder, MIM | {"run": MIM["run"] | {"epochs": 3, "checkpoint_every": 1, "keep_last": 99} | run})


ORDER = GlobalOrder(SAMPLES, seed=0, global_batch=BATCH, micro_batch=BATCH)


def met_at(*samples: int, epochs: int = 3) -> list[int]:
    """The data steps at which one of these samples comes by."""
    steps = range(epochs * SAMPLES // BATCH)
    return [step for step in steps if not {place.index for place in ORDER.global_step(step)}.isdisjoint(samples)]


def samples_of(*data_steps: int) -> str:
    """One sample of each of these data steps."""
    return ",".join(str(ORDER.global_step(step)[3].index) for step in data_steps)


def pair_at_5_and_6() -> tuple[int, int]:
    """Two samples that come one right after the other at data steps 5 and 6, and in no other epoch."""
    for one in ORDER.global_step(5):
        for other in ORDER.global_step(6):
            steps = met_at(one.index, other.index)
            if [a for a, b in pairwise(steps) if b == a + 1] == [5]:
                return one.index, other.index
    raise AssertionError("no such pair")


def updates(out: Path, step: int) -> float:
    """How many updates a checkpoint says were taken."""
    return float(load_file(out / "checkpoints" / f"step-{step:08d}" / "counts.safetensors")["updates"])


# ---- the parts


def test_streak_counts_the_last_run_of_skips() -> None:
    flags = [0, 1, 1, 0, 1, 1, 1, 0, 0, 1]
    streak, run = SkipCounter(), 0
    assert streak.clean()
    for flag in flags:
        streak.note(torch.tensor(float(flag)))
        assert streak.length == run  # one step late: the flag just queued is still to be read
        run = run + 1 if flag else 0
        assert streak.clean() == (not flag)
    assert streak.settle() == 1


def test_detours_leave_exactly_their_data_steps_out(tmp_path: Path) -> None:
    """Against counting by hand, also where a detour begins at the first step or right behind another."""

    class Steps:
        """The data step itself stands for its batches."""

        def steps(self, first: int, last: int) -> Iterator[list[Any]]:
            return iter([[number] for number in range(first, last)])

    detours = SkippedData(tmp_path, main=True)
    for first, last in ((5, 6), (7, 7), (0, 1), (20, 29)):
        detours.add(first, last)
    left = {0, 1, 5, 6, 7, *range(20, 30)}
    expected = [number for number in range(100) if number not in left][:40]
    found = list(detours.stream(Steps(), 0, 40))  # type: ignore[arg-type]
    assert [data_step for data_step, _ in found] == expected
    assert [batches[0] for _, batches in found] == expected
    later = list(detours.stream(Steps(), 11, 40))  # type: ignore[arg-type]
    assert [data_step for data_step, _ in later] == expected[11:]
    again = SkippedData(tmp_path, main=True)
    again.load()
    assert (again.rewinds, again.left_out) == (4, detours.left_out)
    again.forget()
    fresh = SkippedData(tmp_path, main=True)
    fresh.load()
    assert fresh.left_out == []


def test_spike_alarm_hears_a_jump_and_nothing_else() -> None:
    """The running mean is the plain mean at first; noise of one sigma rings no bell, a jump of ten does, NaN is no loss."""
    noise = np.random.default_rng(0).normal(-0.5, 0.01, 400).tolist()
    alarm = SpikeAlarm()
    assert alarm.feed(noise[:40]) == []
    assert alarm.mean == pytest.approx(np.mean(noise[:40]), abs=1e-12)
    assert alarm.variance == pytest.approx(np.var(noise[:40]), abs=1e-12)
    assert alarm.feed([*noise[40:], float("nan")]) == []
    assert alarm.feed([-0.5 + 0.12]) == [-0.5 + 0.12]
    assert alarm.spikes == 1
    fresh = SpikeAlarm()
    assert fresh.feed([0.0] * (SPIKE_PATIENCE - 1) + [9.0]) == []  # not listening yet


def test_loss_scale_moves_like_deepspeeds_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same overflows into both: scale after every step. Windows are reached and hysteresis counts."""
    from deepspeed.runtime.fp16 import loss_scaler
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    from eva_mim.engine.loss_scale import SCALE_HYSTERESIS, SCALE_LEAST, SCALE_START, SCALE_WINDOW, LossScale

    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 1)  # it speaks on rank 0, of a group that is not there
    theirs = DynamicLossScaler(
        init_scale=SCALE_START, scale_window=SCALE_WINDOW, min_scale=SCALE_LEAST, delayed_shift=SCALE_HYSTERESIS,
        consecutive_hysteresis=False, raise_error_at_min_scale=False, dtype=torch.half,
    )
    ours = LossScale("fp16", torch.device("cpu"))
    generator = np.random.default_rng(1)
    flags = [*(generator.random(3000) < 0.004), *(generator.random(200) < 0.5), *(generator.random(1500) < 0.0)]
    seen = set()
    for bad in flags:
        ours.update(torch.tensor(bool(bad)))
        theirs.update_scale(bool(bad))
        assert float(ours.value) == theirs.cur_scale
        seen.add(theirs.cur_scale)
    assert len(seen) > 6
    assert min(seen) == SCALE_LEAST
    copy = LossScale("fp16", torch.device("cpu"))
    copy.restore(ours.state())
    assert copy.state() == ours.state()


def test_update_ratio_is_the_distance_that_the_weights_move() -> None:
    from eva_mim.engine.step import set_rates
    from eva_mim.optim.optimizers import SkippableAdamW

    torch.manual_seed(0)
    weights = [torch.randn(7, 5, requires_grad=True), torch.randn(5, requires_grad=True)]
    groups = [
        {"params": weights[:1], "weight_decay": 0.1, "lr_scale": 1.0, "decays": True},
        {"params": weights[1:], "weight_decay": 0.0, "lr_scale": 0.5, "decays": False},
    ]
    optimizer = SkippableAdamW(groups, lr=1e-2, betas=(0.9, 0.98), eps=1e-6)
    for step in range(4):
        set_rates(optimizer.param_groups, Rates(1e-2 * (step + 1), 0.1))
        optimizer.measure_update = step != 1
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        before = [weight.detach().double().clone() for weight in weights]
        optimizer.found_inf = torch.tensor(float(step == 2))
        optimizer.step()
        moved = sum(float((w.detach().double() - b).square().sum()) for w, b in zip(weights, before, strict=True))
        size = sum(float(b.square().sum()) for b in before)
        ratio = optimizer.update_ratio(torch.device("cpu"), sharded=False)
        assert (ratio is None) == (step == 1)
        if ratio is not None:
            assert float(ratio) == pytest.approx(math.sqrt(moved / size), rel=1e-4)
            assert (moved == 0) == (step == 2)


# ---- whole runs


@pytest.mark.slow
def test_a_step_that_is_not_finite_leaves_the_weights_alone(tmp_path: Path) -> None:
    """Weights and moments after the step are those before it; the log counts it and its means stay finite."""
    out = tmp_path / "run"
    poisoned(samples_of(2), "mim", recipe(tmp_path, epochs=1), "--out", out)
    assert not (out / "checkpoints" / "step-00000003").exists()  # no place to rewind to
    assert updates(out, 4) == 3
    rows = records(out)
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1]
    assert rows[2]["loss"] is None
    assert all(math.isfinite(row["loss"]) for row in rows[:2] + rows[3:])


@pytest.mark.slow
@pytest.mark.parametrize("settings", [(), ("run.engine=deepspeed", "run.zero_stage=2")])
def test_a_skipped_step_leaves_batch_norms_alone(tmp_path: Path, settings: tuple[str, ...]) -> None:
    """NaN pixels go through the forward pass before anybody knows; the running statistics stay finite, and move otherwise."""
    tree = CLASSIFY | {"student": {"name": "convnet_nano_32"}, "optim": CLASSIFY["optim"] | {"layer_decay": 1.0}}
    path = write_recipe(tmp_path, tree)
    poisoned(samples_of(2), "classify", path, *settings, "--out", tmp_path / "run", processes=2 if settings else 1)
    assert records(tmp_path / "run")[-1]["skipped"] >= 1
    weights = load_file(tmp_path / "run" / "model.safetensors")
    figures = {name: value for name, value in weights.items() if name.endswith("running_mean")}
    assert len(figures) > 3
    assert all(value.isfinite().all() for value in weights.values())
    assert all(value.abs().max() > 1e-4 for value in figures.values())


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, pytest.param(1, marks=pytest.mark.long), 2, 3])
def test_a_nan_on_one_of_two_ranks_is_skipped_on_both(tmp_path: Path, zero_stage: int) -> None:
    """Each poisoned sample lies on one rank. The run follows the one-process run with the same poison."""
    bad = samples_of(1, 3)
    path = recipe(tmp_path, epochs=None, samples=144, checkpoint_every=99)
    poisoned(bad, "mim", path, "--out", tmp_path / "one")
    settings = ["run.engine=deepspeed", f"run.zero_stage={zero_stage}", "run.micro_batch=6"]
    poisoned(bad, "mim", path, *settings, "--out", tmp_path / "two", processes=2)
    rows = [records(tmp_path / name) for name in ("one", "two")]
    skipped = [row["skipped"] for row in rows[0]]
    assert skipped[-1] >= 2
    assert [row["skipped"] for row in rows[1]] == skipped
    finite = [[row["loss"] for row in side if row["loss"] is not None] for side in rows]
    assert finite[1] == pytest.approx(finite[0], abs=2e-5)
    ratios = [[row["update_ratio"] for row in side if row["update_ratio"] is not None] for side in rows]
    assert ratios[1] == pytest.approx(ratios[0], rel=1e-3)
    assert min(ratios[0]) > 1e-5
    assert len(ratios[0]) == len(rows[0]) - skipped[-1]
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=2e-4, rtol=0)


@pytest.mark.slow
def test_a_streak_rewinds_and_leaves_its_samples_out(tmp_path: Path) -> None:
    """Data steps 5 and 6 are bad: back to step 5, whose checkpoint is still being written to a slow disk, on with data step 7. A
    kill after the rewind changes nothing."""
    bad = ",".join(map(str, pair_at_5_and_6()))
    path = recipe(tmp_path, max_skips=2)
    done = poisoned(bad, "mim", path, "--out", tmp_path / "straight", disk=0.1)
    assert "back to step 5, and data steps 5 to 6 are left out (rewind 1 of at most 3)" in done.stderr
    detours = json.loads((tmp_path / "straight" / "detours.json").read_text())
    assert detours == {"rewinds": 1, "left_out": [[5, 6]]}
    assert [row["step"] for row in records(tmp_path / "straight")] == list(range(1, 13))
    assert records(tmp_path / "straight", "rewind")[0]["last_left_out"] == 6
    assert [row["loss"] is None for row in records(tmp_path / "straight")][4:6] == [False] * 2
    wide = recipe(tmp_path / "wide", max_skips=3)
    poisoned(bad, "mim", wide, "--out", tmp_path / "patient")
    assert losses(tmp_path / "straight")[:5] == losses(tmp_path / "patient")[:5]
    assert [row["loss"] is None for row in records(tmp_path / "patient")][4:8] == [False, True, True, False]
    # Two skipped steps and two left out meet the same data with the same weights, but for the learning rate of the step.
    assert losses(tmp_path / "straight")[5] == pytest.approx(losses(tmp_path / "patient")[7], abs=1e-6)

    out = stopped_after(8, tmp_path / "straight", tmp_path / "killed")
    poisoned(bad, "mim", path, "--out", out)
    assert losses(out) == losses(tmp_path / "straight")
    same_weights(out / "model.safetensors", tmp_path / "straight" / "model.safetensors")


@pytest.mark.slow
def test_after_the_last_rewind_a_dump_is_written_and_replayed(tmp_path: Path) -> None:
    """One sample is bad and one rewind allowed: the run stops when the sample comes by the second time. The dump names it;
    a replay in one process breaks the same way, and without the poison it does not."""
    bad = samples_of(2)
    stop = met_at(int(bad))[1]
    out = tmp_path / "run"
    path = recipe(tmp_path, max_skips=1, max_rewinds=1)
    settings = ["run.engine=deepspeed", "run.zero_stage=2", "run.micro_batch=6"]
    stopped = poisoned(bad, "mim", path, *settings, "--out", out, processes=2, code=3)
    assert "Diverged" not in stopped.stderr.replace("Diverged:", "")
    dump = next((out / "dumps").iterdir())
    assert f"eva-mim replay {dump}" in stopped.stderr
    record = json.loads((dump / "dump.json").read_text())
    assert (record["processes"], record["micro_batches"], record["data_step"]) == (2, 2, stop)
    assert [row["index"] for row in record["samples"][str(stop)]] == [place.index for place in ORDER.global_step(stop)]
    weights = load_file(dump / "weights.safetensors")
    name = "trunk.blocks.0.mlp.fc1"
    assert record["layers"][name]["weight"] == pytest.approx(
        max(float(weights[f"{name}.weight"].abs().max()), float(weights[f"{name}.bias"].abs().max()))
    )
    again = poisoned(bad, "replay", dump)
    assert "reproduced: the step is not finite" in again.stdout
    assert again.stdout.count("loss nan") == 1  # the sample lies in one micro-batch of one rank
    healthy = poisoned("none", "replay", dump, code=1)
    assert "not reproduced" in healthy.stdout


@pytest.mark.slow
def test_a_contrastive_step_is_replayed_as_a_whole(tmp_path: Path) -> None:
    """Two ranks with two micro-batches of 6 each find their pairs among all 24, here as in the run."""
    path = write_recipe(tmp_path, CLIP | {"run": CLIP["run"] | {"max_skips": 1}})
    settings = ["run.engine=deepspeed", "run.micro_batch=6"]
    poisoned("all", "clip", path, *settings, "--out", tmp_path / "run", processes=2, code=3)
    dump = next((tmp_path / "run" / "dumps").iterdir())
    healthy = poisoned("none", "replay", dump, code=1).stdout
    said = [line for line in healthy.splitlines() if line.startswith("  rank ")]
    poisoned("none", "clip", path, *settings, "run.epochs=1", "--out", tmp_path / "healthy", processes=2)
    expected = losses(tmp_path / "healthy")[0]
    assert [float(line.split("loss ")[1].split(",")[0]) for line in said] == pytest.approx([expected] * 4, rel=2e-5)


@pytest.mark.slow
def test_a_dump_is_replayed_with_and_without_the_parent(tmp_path: Path) -> None:
    """Some recipes cannot be without init_from (a probe, head rows); and the parent may be gone."""
    parent = write_recipe(tmp_path / "parent", CLASSIFY | {"run": CLASSIFY["run"] | {"epochs": 1}})
    poisoned("none", "classify", parent, "--out", tmp_path / "parent" / "run")
    run = CLASSIFY["run"] | {"max_skips": 1}
    tree = CLASSIFY | {"init_from": str(tmp_path / "parent" / "run"), "run": run}
    poisoned("all", "classify", write_recipe(tmp_path, tree), "--out", tmp_path / "run", code=3)
    dump = next((tmp_path / "run" / "dumps").iterdir())
    first = poisoned("none", "replay", dump, code=1).stdout
    shutil.rmtree(tmp_path / "parent")
    assert poisoned("none", "replay", dump, code=1).stdout == first


@pytest.mark.slow
def test_without_a_checkpoint_the_run_stops_at_once_with_a_dump(tmp_path: Path) -> None:
    stopped = poisoned("all", "mim", recipe(tmp_path, max_skips=3), "--out", tmp_path / "run", code=3)
    assert "3 steps in a row have no finite gradient, and there is no checkpoint to rewind to" in stopped.stderr
    assert "Traceback" not in stopped.stderr


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [None, 2, *(pytest.param(stage, marks=pytest.mark.long) for stage in (0, 3))])
def test_fp16_brings_its_scale_down_and_learns(tmp_path: Path, zero_stage: int | None) -> None:
    """From an absurd scale: overflows are skipped, the scale halves after every second at first, then training goes on."""
    path = recipe(tmp_path, precision="fp16", global_batch=4, epochs=None, samples=64, checkpoint_every=99, evaluate_every=99)
    settings = [] if zero_stage is None else ["run.engine=deepspeed", f"run.zero_stage={zero_stage}"]
    processes = 2 if settings else 1
    poisoned("none", "mim", path, *settings, "--out", tmp_path / "run", processes=processes, scale=2.0**22)
    rows = records(tmp_path / "run")
    scales = [row["loss_scale"] for row in rows]
    assert rows[0]["skipped"] == 1
    assert rows[-1]["skipped"] < 12
    assert scales[0] == 2.0**22
    halvings = round(math.log2(scales[0] / scales[-1]))
    assert halvings == rows[-1]["skipped"] - 1  # the first overflow is forgiven
    taken = [row for row in rows if row["loss"] is not None]
    assert taken[-1]["loss"] < taken[0]["loss"] - 0.02
    assert all(row["grad_norm"] < 100 for row in taken)
