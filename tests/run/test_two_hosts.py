"""Two hosts, a process on each: a lost host, a hung one and a cut link end the run on every process that is left, which then goes
on exactly. The hosts are network namespaces with a cable between them; faults of processes alone are tried without."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.ranks import Launched, ends
from tests.tiny import MIM, losses, run, same_weights, write_recipe

pytestmark = pytest.mark.slow

PATIENCE = 6.0
"""Seconds that processes wait for each other once they have met."""
RECIPE = MIM | {"run": MIM["run"] | {"engine": "deepspeed", "zero_stage": 2, "epochs": 4, "evaluate_every": 4,
                                     "checkpoint_every": 3,
                                     "timeout_minutes": PATIENCE / 60}}


@dataclass
class Hosts:
    """Where the two ranks run."""

    networks: tuple[str | None, str | None]
    """Network namespace of each."""
    address: str
    """Of the first."""
    interfaces: tuple[str, str]
    cut: Callable[[], object]

    def start(self, out: Path, recipe: Path) -> list[Launched]:
        """Both ranks, without a launcher; each speaks into a file of its own."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        out.mkdir(exist_ok=True)
        started: list[Launched] = []
        for rank, network in enumerate(self.networks):
            own = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": self.address,
                   "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": self.interfaces[rank]}
            words = [str(recipe), "--out", str(out)]
            started.append(Launched(ends, "pretrain.mim", words, log=out / f"rank-{rank}.log", network=network, **own))
        return started


ON_ONE_HOST = Hosts((None, None), "127.0.0.1", ("lo", "lo"), lambda: None)


def ip(*words: str, check: bool = True) -> bool:
    """`ip WORDS`; whether it could be done."""
    return subprocess.run(["ip", *words], capture_output=True, check=check).returncode == 0


@pytest.fixture
def cabled() -> Iterator[Hosts]:
    """Two network namespaces."""
    names = [f"eva{os.getpid()}{side}" for side in "ab"]
    if shutil.which("ip") is None or not ip("netns", "add", names[0], check=False):
        pytest.skip("network namespaces take `ip` (iproute2) and rights that this process does not have")
    try:
        ip("netns", "add", names[1])
        if not ip("link", "add", "cable0", "netns", names[0], "type", "veth", "peer", "name", "cable1", "netns", names[1],
                  check=False):
            pytest.skip("this kernel has no veth pairs")
        for number, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", f"cable{number}")
            for device in (f"cable{number}", "lo"):
                ip("-n", name, "link", "set", device, "up")
        cut = partial(ip, "-n", names[1], "link", "set", "cable1", "down")
        yield Hosts((names[0], names[1]), "10.77.0.1", ("cable0", "cable1"), cut)
    finally:
        for name in names:
            ip("netns", "del", name, check=False)


@pytest.fixture
def one_host() -> Hosts:
    """Two processes on this one."""
    return ON_ONE_HOST


def until(step: int, out: Path, processes: list[Launched]) -> None:
    """Wait for the log line of `step`."""
    late = time.monotonic() + 120
    log = out / "metrics.jsonl"
    while not (log.exists() and log.read_text().count('"train"') >= step):
        assert time.monotonic() < late
        assert all(process.poll() is None for process in processes), (out / "rank-0.log").read_text()
        time.sleep(0.005)


def ended(process: Launched, log: Path) -> str:
    """A process that has lost the other ends in time, with its exit code and one line; returns the line."""
    began = time.monotonic()
    assert process.wait(PATIENCE + 30) == 69, log.read_text()
    assert time.monotonic() - began < PATIENCE + 15  # 2 s of grace, and what this machine needs to end a process
    text = log.read_text()
    assert "Traceback" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    return line


def finished(out: Path, recipe: Path) -> str:
    """The same run to its end, by patient processes; what it says."""
    return run("mim", recipe, out, "run.timeout_minutes=10", processes=2).stderr


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that was left alone."""
    folder = tmp_path_factory.mktemp("straight")
    finished(folder / "run", write_recipe(folder, RECIPE))
    return folder / "run"


@pytest.mark.parametrize(
    ("place", "fault", "lost"),
    [
        ("one_host", "kill", 1),
        ("cabled", "cut", None),
        pytest.param("one_host", "hang", 0, marks=pytest.mark.long),
        pytest.param("cabled", "kill", 0, marks=pytest.mark.long),
        pytest.param("cabled", "hang", 1, marks=pytest.mark.long),
    ],
)
def test_who_is_left_stops_and_the_run_goes_on_exactly(
    tmp_path: Path, request: pytest.FixtureRequest, straight: Path, place: str, fault: str, lost: int | None
) -> None:
    """A process is killed, or stopped like on a host that hangs; or the link is cut, and neither hears that the other is gone.
    What hangs is ended by hand, as a scheduler would. Then the same command comes to the end of a run that was left alone."""
    hosts: Hosts = request.getfixturevalue(place)
    recipe, out = write_recipe(tmp_path, RECIPE), tmp_path / "run"
    processes = hosts.start(out, recipe)
    try:
        until(8, out, processes)
        if lost is None:
            hosts.cut()
        else:
            processes[lost].send_signal(signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
        for rank, process in enumerate(processes):
            if rank != lost:
                line = ended(process, out / f"rank-{rank}.log")
                assert f"error: rank {rank} in step " in line
                assert f"and run.timeout_minutes={PATIENCE / 60:g}: another process has gone or does not answer" in line
                assert fault != "hang" or "Timed out" in line
                assert rank or not list((out / "checkpoints").glob("tmp-*"))  # what was being written has been written
    finally:
        for process in processes:
            process.kill()
            process.wait(30)
    assert "going on from step " in finished(out, recipe)
    assert losses(out) == losses(straight)
    same_weights(out / "model.safetensors", straight / "model.safetensors")
