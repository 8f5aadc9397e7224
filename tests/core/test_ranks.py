"""The processes that tests share: what fails in them fails the test, and nothing of it is left for the next one."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from eva_mim.core.distributed import all_reduce_sum, rank, world_size
from tests import ranks
from tests.ranks import on_ranks, pool
from tests.tiny import python, started

pytestmark = pytest.mark.slow


def sum_of_ranks() -> tuple[int, float, str]:
    return rank(), float(all_reduce_sum(torch.tensor(1.0 + rank()))), os.environ["WORD"]


def fail_on(number: int, way: str) -> None:
    """One rank fails; the other waits for it for ever."""
    os.environ["LEFT"] = "behind"
    if rank() == number:
        match way:
            case "raises":
                raise ValueError("broken")
            case "ends":
                sys.exit(3)
            case "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hangs":
                time.sleep(600)
    all_reduce_sum(torch.zeros(1))


def surroundings() -> tuple[int, str | None]:
    return world_size(), os.environ.get("LEFT")


@pytest.mark.parametrize("way", ["raises", "dies", "hangs"])
def test_a_rank_that_fails_is_told_and_replaced(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "GRACE", 0.5)
    monkeypatch.setenv("WORD", "w")
    assert on_ranks(2, sum_of_ranks) == [(0, 3.0, "w"), (1, 3.0, "w")]
    broken = pool(2)
    outcomes = broken(fail_on, 1, way, patience=2.0 if way == "hangs" else 60.0)
    assert all(outcome.failed for outcome in outcomes)
    assert way == "dies" or "rank 0 hangs" in outcomes[0].err  # gloo tells of a death
    said = {"raises": "ValueError: broken", "dies": "rank 1 has died", "hangs": "rank 1 hangs"}[way]
    assert said in outcomes[1].err
    assert outcomes[1].value == {"raises": 1}.get(way)
    assert not any(process.is_alive() for process in broken.processes)
    assert on_ranks(2, surroundings) == [(2, None)] * 2


def test_one_process_goes_on_after_a_failure_as_if_nothing_was() -> None:
    alone = pool(1)
    (outcome,) = alone(fail_on, 0, "ends")
    assert (outcome.failed, outcome.value) == (True, 3)
    assert pool(1) is alone
    assert on_ranks(1, surroundings) == [(1, None)]
    with pytest.raises(AssertionError, match="ValueError: broken"):
        on_ranks(1, fail_on, 0, "raises")


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_programs_started_by_a_line_are_programs(tmp_path: Path, processes: int) -> None:
    """`python -m` and torchrun, to their exit codes."""
    recipe = tmp_path / "none.yaml"
    done = started(python("eva_mim.cli", "mim", recipe, "--out", tmp_path, processes=processes), 2)
    assert f"{recipe}" in done.stderr
