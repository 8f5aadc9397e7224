"""Waiting for another rank's work: as long as it lives, and no longer. Real processes with gloo."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path

import pytest

from tests.ranks import Launched, script

WORKING = """
import os, signal, sys, time
from datetime import timedelta
import torch
from eva_mim.core import distributed
from eva_mim.core.errors import LostProcess

worker, seconds, kill = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3] == "kill"
distributed.setup("cpu", 3 / 60)

def work():
    time.sleep(seconds / 2)
    if kill:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(seconds / 2)
    return "done"

try:
    for _ in range(3):
        assert distributed.run_on(lambda: distributed.rank(), True) == {0: 0, 1: 1, 2: 2}
    print(distributed.run_on(work, distributed.rank() == worker))
    store = distributed._store()
    print(store.check(["agreed/2/all"]), store.check(["agreed/3/all"]))
    distributed.leave_group()
except LostProcess as error:
    print(f"stopped: {error}")
    sys.stdout.flush()
    os._exit(2)
"""


GONE = "the process that keeps the group together (rank 0, or its launcher) is gone"


def three(folder: Path, worker: int, seconds: float, kill: str = "") -> tuple[list[str], list[int]]:
    """What each of three ranks says, and its exit code. None may hang."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    words, logs = (str(worker), str(seconds), kill), [folder / str(rank) for rank in range(3)]
    ranks = [Launched(script, WORKING, *words, log=log, RANK=str(rank), **group) for rank, log in enumerate(logs)]
    end = time.monotonic() + 200
    try:
        codes = [rank.wait(end - time.monotonic()) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [_own(log.read_text()) for log in logs], codes


def _own(said: str) -> str:
    """Without what torch's store says of lost connections."""
    return said[max(0, said.find("stopped: ")) :].strip()


@pytest.mark.slow
@pytest.mark.parametrize("worker", [0, 1])
def test_work_may_take_longer_than_a_collective(tmp_path: Path, worker: int) -> None:
    """6 s, where a collective may take 3; and the store keeps the keys of one turn."""
    said, codes = three(tmp_path, worker, 6)
    assert codes == [0, 0, 0]
    assert said == [f"{{{worker}: 'done'}}\nFalse True"] * 3


@pytest.mark.slow
def test_a_rank_that_dies_at_work_is_not_waited_for(tmp_path: Path) -> None:
    said, codes = three(tmp_path, 1, 2, "kill")
    assert codes == [2, -signal.SIGKILL, 2]
    silent = "only 2 of 3 processes came this far, and the others gave no sign of life for 3 s"
    assert said[0] == f"stopped: rank 0: {silent}"
    # Rank 0 may have stopped just before, and its store with it.
    assert said[2] == f"stopped: rank 2: {silent}" or said[2].startswith(f"stopped: rank 2: {GONE}")


@pytest.mark.slow
def test_the_rank_that_keeps_the_store_may_die_as_well(tmp_path: Path) -> None:
    said, codes = three(tmp_path, 0, 2, "kill")
    assert codes == [-signal.SIGKILL, 2, 2]
    assert [text.partition(GONE)[0] for text in said[1:]] == ["stopped: rank 1: ", "stopped: rank 2: "]
