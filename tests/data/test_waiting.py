"""A run that waits for a batch which never comes: it ends with the reason, or on the first signal. Real small file systems, real
long paths, named pipes in the place of images."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path

import psutil
import pytest

from eva_mim.data.loader import _postponed
from tests.conftest import make_folder, picture, png
from tests.ranks import Launched, ends, script
from tests.tiny import CLASSIFY, RUN, VIT, records, run, write_recipe

pytestmark = pytest.mark.slow
LITTLE_SHARED_MEMORY = """
import ctypes, subprocess, sys
def mounted(*words): return subprocess.run(["mount", *words], stderr=subprocess.DEVNULL).returncode == 0
if ctypes.CDLL(None).unshare(0x00020000) or not mounted("--make-rprivate", "/") or not mounted(
        "-t", "tmpfs", "-o", f"size={sys.argv.pop(1)}", "tmpfs", "/dev/shm"):
    sys.exit(77)
from eva_mim.run.program import leave
from finetune.classify import main
leave(main(sys.argv[1:]))
"""
LONG_PATH = """
import multiprocessing, sys, tempfile
tempfile.tempdir = sys.argv.pop(1)
multiprocessing.current_process()._config.pop("tempdir", None)
from eva_mim.run.program import leave
from finetune.classify import main
leave(main(sys.argv[1:]))
"""
SHORT_PATIENCE = """
import sys
from eva_mim.run import loop, signals
signals.PATIENCE = loop.PATIENCE = 2.0
from eva_mim.run.program import leave
from finetune.classify import main
leave(main(sys.argv[1:]))
"""

SLOW_TO_BEGIN = """
import sys, time
from eva_mim.data import loader
begin = loader._begin_worker
loader._begin_worker = lambda *arguments: (time.sleep(1.0), begin(*arguments))
from eva_mim.run.program import leave
from finetune.classify import main
leave(main(sys.argv[1:]))
"""


def ended(process: Launched, log: Path, code: int) -> str:
    """What a process says that ends within a minute, without a traceback."""
    assert process.wait(60) == code, log.read_text()
    assert "Traceback" not in log.read_text()
    return log.read_text()


LARGE = ("run.global_batch=240", "student.image_size=224", "student.patch_size=32", "data.scenes.train=960")
"""Batches of 36 MB, of which two loader processes have four under way."""


@pytest.mark.parametrize(("size", "workers", "settings"), [
    (64 * 2**10, 1, ()), pytest.param(100 * 2**10, 3, (), marks=pytest.mark.long),  # a batch has 74 kB
    pytest.param(64 * 2**20, 2, LARGE, marks=pytest.mark.long)], ids=["64 kB", "100 kB", "Docker's 64 MB"])
def test_full_shared_memory_ends_the_run_with_its_size(
    tmp_path: Path, size: int, workers: int, settings: tuple[str, ...]
) -> None:
    """Where a batch does not fit, and where the batches of several workers do not fit together."""
    recipe = write_recipe(tmp_path, CLASSIFY | {"data": CLASSIFY["data"] | {"workers": workers}})
    line = [str(size), str(recipe), *settings, "--out", str(tmp_path / "run")]
    process = Launched(script, LITTLE_SHARED_MEMORY, *line, log=tmp_path / "log")
    if process.wait(60) == 77:
        pytest.skip("mounting takes rights that this process does not have")
    said = ended(process, tmp_path / "log", 2)
    megabytes = size / 1e6
    assert f"error: /dev/shm is full ({megabytes:.3g} MB in all, " in said
    assert "docker run --shm-size=16g), or set data.workers=0" in said


def test_a_long_path_for_temporary_files_is_named(tmp_path: Path) -> None:
    """Its sockets have at most 107 characters (unix(7)); jobs on clusters have folders with long names."""
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    recipe = write_recipe(tmp_path, CLASSIFY | {"data": CLASSIFY["data"] | {"workers": 1}})
    process = Launched(script, LONG_PATH, str(folder), str(recipe), "--out", str(tmp_path / "run"), log=tmp_path / "log")
    assert f"error: TMPDIR={folder} is too long a path ({len(str(folder))} characters)" in ended(process, tmp_path / "log", 2)


def waiting(tmp_path: Path, workers: int) -> tuple[Path, Path]:
    """A recipe of eight steps, and the named pipe among its images which nobody writes to."""
    root = make_folder(tmp_path / "images", {"a": 24, "b": 24}, (32, 32))
    pipe = root / "a" / "00011.png"
    pipe.unlink()
    os.mkfifo(pipe)
    data = {"root": str(root), "workers": workers, "val_share": 0.2}
    settings = RUN | {"global_batch": 4, "checkpoint_every": 99}
    return write_recipe(tmp_path, CLASSIFY | {"data": data, "run": settings, "student": VIT}), pipe


def until_it_waits(out: Path, process: Launched, log: Path) -> int:
    """Number of steps taken when for two seconds no other one is."""
    taken, since, end = -1, time.monotonic(), time.monotonic() + 100
    while time.monotonic() - since < 2:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end
        now = len(records(out)) if (out / "metrics.jsonl").exists() else -1
        if now != taken or taken < 0:
            taken, since = now, time.monotonic()
        time.sleep(0.05)
    return taken


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), pytest.param(signal.SIGINT, 130, marks=pytest.mark.long)])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_ends_a_run_that_waits(tmp_path: Path, workers: int, number: int, code: int) -> None:
    """At once, with a checkpoint of the last step; with the image there the same command goes on."""
    recipe, pipe = waiting(tmp_path, workers)
    out, log = tmp_path / "run", tmp_path / "log"
    process = Launched(ends, "finetune.classify", [str(recipe), "--out", str(out)], log=log)
    assert until_it_waits(out, process, log) > 0
    process.send_signal(number)
    began = time.monotonic()
    ended(process, log, code)
    assert time.monotonic() - began < 30
    steps = len(records(out))
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step-{steps:08d}"]
    pipe.unlink()
    pipe.write_bytes(png(picture(11, (32, 32))))
    assert f"going on from step {steps}" in run("classify", recipe, out).stderr


@pytest.mark.long
def test_of_two_processes_each_ends_without_the_other(tmp_path: Path) -> None:
    """They cannot agree on a step; each waits 2 s here, 10 s for users."""
    recipe, _ = waiting(tmp_path, 1)
    out = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    logs = [tmp_path / f"log-{rank}" for rank in range(2)]
    ranks = [Launched(script, SHORT_PATIENCE, str(recipe), "run.engine=deepspeed", "--out", str(out), log=log, RANK=str(rank),
                      LOCAL_RANK=str(rank), **group) for rank, log in enumerate(logs)]
    until_it_waits(out, ranks[0], logs[0])
    for process in ranks:
        process.send_signal(signal.SIGTERM)
    codes = [process.wait(60) for process in ranks]
    assert set(codes) <= {75, 69}  # one waits for its batch, the other for the first one
    assert 75 in codes
    assert "no batch came within 2 s of the signal" in "".join(log.read_text() for log in logs) or codes[0] != 75
    assert all("Traceback" not in log.read_text() for log in logs)


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSEGV, marks=pytest.mark.long)])
def test_a_killed_loader_process_is_a_lost_one(tmp_path: Path, number: int) -> None:
    """As the kernel kills for want of memory: one line, and the exit code that is started again."""
    recipe, _ = waiting(tmp_path, 1)
    out, log = tmp_path / "run", tmp_path / "log"
    process = Launched(ends, "finetune.classify", [str(recipe), "--out", str(out)], log=log)
    until_it_waits(out, process, log)
    (worker,) = (int(text) for text in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
    os.kill(worker, number)
    said = ended(process, log, 69)
    assert "a loader process (pid" in said
    assert "fewer data.workers or smaller images help" in said


def test_signals_wait_while_loader_processes_begin() -> None:
    """Also one that another thread takes, since only the main one blocks it: the handler comes at the end, once for each."""
    said: list[str] = []
    before = signal.signal(signal.SIGUSR1, lambda *_: said.append("handled"))
    idle = threading.Event()
    other = threading.Thread(target=idle.wait)
    other.start()
    try:
        with _postponed({signal.SIGUSR1}):
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.1)
            said.append("block ends")
        assert said == ["block ends", "handled"]
    finally:
        idle.set()
        other.join()
        signal.signal(signal.SIGUSR1, before)


def test_a_signal_may_come_while_loader_processes_begin(tmp_path: Path) -> None:
    """To all processes, as a terminal sends it: a loader process that has not begun takes it neither for its own nor dies."""
    recipe, log = write_recipe(tmp_path, CLASSIFY | {"run": RUN | {"epochs": 50}}), tmp_path / "log"
    process = Launched(script, SLOW_TO_BEGIN, str(recipe), "data.workers=2", "--out", str(tmp_path / "run"), log=log)
    end = time.monotonic() + 60
    while len(psutil.Process(process.pid).children()) < 2:
        assert time.monotonic() < end
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    assert ended(process, log, 130).count("SIGINT: ending this step") == 1
