"""One writer to a folder: real processes, on this host and on hosts of other names; killed ones, stopped ones, requeued ones."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from eva_mim.core import lock
from eva_mim.core.errors import UserError
from eva_mim.core.lock import locked
from tests.conftest import make_folder
from tests.ranks import Launched, ends, script
from tests.tiny import CLASSIFY, RUN, finish, python, records, run, write_recipe

RENEWED, EXPIRED = 0.25, 3.0
HOLD = f"""
import sys, time
from pathlib import Path
from eva_mim.core import lock
if sys.argv[2] == "quick":
    lock.RENEWED, lock.EXPIRED = {RENEWED}, {EXPIRED}
with lock.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases that expire within the patience of a test, here and in `HOLD`."""
    monkeypatch.setattr(lock, "RENEWED", RENEWED)
    monkeypatch.setattr(lock, "EXPIRED", EXPIRED)


def holding(folder: Path, log: Path, host: str | None = None, pace: str = "quick", **surroundings: str) -> Launched:
    """A process that holds the folder."""
    process = Launched(script, HOLD, str(folder), pace, log=log, host=host, **surroundings)
    end = time.monotonic() + 60
    while not (log.exists() and "held" in log.read_text()):
        if process.poll() is not None and "PermissionError" in log.read_text():
            pytest.skip("a host's name takes rights that this process does not have")
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end
        time.sleep(0.02)
    return process


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Launched]:
    """A process on this host that holds `tmp_path / "out"`, with the durations of users."""
    process = holding(tmp_path / "out", tmp_path / "log", pace="usual")
    yield process
    process.kill()


@pytest.fixture
def elsewhere(tmp_path: Path, quick: None) -> Iterator[Launched]:
    """The same on a host of another name, in a job of Slurm, with short durations."""
    process = holding(tmp_path / "out", tmp_path / "log", "far", SLURM_JOB_ID="77")
    yield process
    process.send_signal(signal.SIGCONT)
    process.kill()


@pytest.mark.slow
def test_the_owner_is_named_and_everybody_else_refused(tmp_path: Path, here: Launched) -> None:
    """At once: on one host it is known that the owner lives."""
    out = tmp_path / "out"
    wanted = f"{out} is in use by process {here.pid} on {socket.gethostname()} since {time.strftime('%Y-')}"
    stage = write_recipe(tmp_path, CLASSIFY)
    pipeline = tmp_path / "pipeline.yaml"
    pipeline.write_text(f"stages: [{{name: a, program: classify, recipe: {stage}}}]")
    images = make_folder(tmp_path / "images", {"a": 2, "b": 2})
    for line in (
        python("finetune.classify", stage, "--out", out), python("finetune.classify", stage, "--out", out, processes=2),
        python("eva_mim.commands.pipeline", pipeline, "--out", out),
        python("eva_mim.commands.data", "pack", images, "--out", out),
    ):
        began = time.monotonic()
        said = finish(line, code=2).stderr
        assert time.monotonic() - began < 60  # and not 90, which another host is given
        assert f"error: {wanted}" in said, said
        assert "Traceback" not in said
    assert sorted(path.name for path in out.iterdir()) == [".lock", ".lock.json"]


@pytest.mark.slow
def test_the_same_command_twice_is_one_whole_run(tmp_path: Path) -> None:
    """The second is refused, and the first has every line of its log."""
    recipe = write_recipe(tmp_path, CLASSIFY | {"run": RUN | {"epochs": 12}})
    out = tmp_path / "run"
    first = Launched(ends, "finetune.classify", [str(recipe), "--out", str(out)], log=tmp_path / "log")
    end = time.monotonic() + 100
    while not (out / "metrics.jsonl").exists():
        assert first.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < end
        time.sleep(0.01)
    refused = run("classify", recipe, out, code=2).stderr
    assert f"is in use by process {first.pid} on {socket.gethostname()}" in refused
    assert first.wait(200) == 0
    assert [row["step"] for row in records(out)] == list(range(1, 49))
    assert not list(out.glob(".lock*"))


@pytest.mark.slow
def test_a_dead_owner_is_no_owner(tmp_path: Path, here: Launched) -> None:
    here.kill()
    here.wait(30)
    began = time.monotonic()
    with locked(tmp_path / "out"):
        assert time.monotonic() - began < 5
        assert f'"process": {os.getpid()}' in (tmp_path / "out" / ".lock.json").read_text()
    assert not list((tmp_path / "out").iterdir())


ORPHAN = """
import os, sys, time
from pathlib import Path
from eva_mim.core.lock import locked
if (child := os.fork()):
    print(child, flush=True)
    time.sleep(100)
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.mark.slow
def test_a_zombie_is_a_dead_owner(tmp_path: Path) -> None:
    """Killed, and its parent does not ask for the exit code."""
    out, log = tmp_path / "out", tmp_path / "log"
    parent = Launched(script, ORPHAN, str(out), log=log)
    try:
        end = time.monotonic() + 60
        while not (log.exists() and "held" in log.read_text()):
            assert time.monotonic() < end
            time.sleep(0.02)
        child = int(next(line for line in log.read_text().splitlines() if line.isdigit()))
        with pytest.raises(UserError, match=f"is in use by process {child}"), locked(out):
            pass
        os.kill(child, signal.SIGKILL)
        while psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < end
        began = time.monotonic()
        with locked(out):
            assert time.monotonic() - began < 5
    finally:
        parent.kill()


@pytest.mark.slow
def test_a_live_owner_on_another_host_is_seen_to_live(
    tmp_path: Path, elsewhere: Launched, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=rf"is in use by process {elsewhere.pid} on far since .*choose another --out"), \
            locked(tmp_path / "out"):
        pass
    assert f"is held by process {elsewhere.pid} on far since" in capsys.readouterr().err
    assert elsewhere.poll() is None


@pytest.mark.slow
def test_a_dead_owner_on_another_host_is_waited_for(tmp_path: Path, elsewhere: Launched) -> None:
    """Nobody can ask whether it lives: its lease has to run out."""
    elsewhere.kill()
    elsewhere.wait(30)
    began = time.monotonic()
    with locked(tmp_path / "out"):
        assert EXPIRED - 2 * RENEWED < time.monotonic() - began < 10 * EXPIRED


@pytest.mark.slow
@pytest.mark.parametrize(("restarts", "at_once"), [("1", True), ("0", False)])
def test_a_requeued_job_takes_over(
    tmp_path: Path, elsewhere: Launched, monkeypatch: pytest.MonkeyPatch, restarts: str, at_once: bool
) -> None:
    """Slurm ends a job before it starts it again; another step of the same start is another process."""
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    elsewhere.kill()
    elsewhere.wait(30)
    began = time.monotonic()
    with locked(tmp_path / "out"):
        assert (time.monotonic() - began < EXPIRED / 2) == at_once


@pytest.mark.slow
def test_who_slept_too_long_ends_when_it_wakes(tmp_path: Path, elsewhere: Launched) -> None:
    """Its folder has another owner by then."""
    elsewhere.send_signal(signal.SIGSTOP)
    with locked(tmp_path / "out"):
        elsewhere.send_signal(signal.SIGCONT)
        assert elsewhere.wait(30) == 2
    said = (tmp_path / "log").read_text()
    assert f"error: {tmp_path / 'out'} was taken by process {os.getpid()} on {socket.gethostname()}" in said


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_what_cannot_be_a_folder_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=rf"--out {tmp_path / name}: .*; choose another folder"), locked(tmp_path / name):
        pass
    assert (tmp_path / "file").read_text() == "mine"
