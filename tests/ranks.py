"""Processes that stay for the session: tests call functions, and the programs themselves, in them, and start no programs.

Importing the libraries costs more than a tiny run: it is done once, in a process that all others are forks of. `pool(n)` has n
processes, for n > 1 the ranks of a gloo group; each has its own globals, signals and environment. A call that hangs is a failure,
and after a failure the next call meets new processes.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import io
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection, wait
from typing import Any

PATIENCE = 240.0
"""Seconds for a call."""
CLONE_NEWNET, CLONE_NEWUTS = 0x40000000, 0x04000000
"""Of linux/sched.h."""
GRACE = 10.0
"""Seconds for the other ranks to come to an end after one has failed."""
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
PROGRAMS = ("pretrain.mim", "pretrain.clip", "finetune.classify", "finetune.probe", "finetune.probe_data", "finetune.segment",
            "finetune.video")
SLOW_TO_IMPORT = ("open_clip", "deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer", "torch.utils.tensorboard", "fsspec")
"""What the programs import when they first need it; DeepSpeed's Muon, which it imports for any optimizer, takes 4 s."""
_pools: dict[int, Pool] = {}


@dataclass
class Outcome:
    """What came of a call on one rank."""

    value: Any
    """What the function returned, or the exit code that it ended with."""
    failed: bool
    out: str
    err: str


class Pool:
    """The processes; `Pool(n)(function, *arguments)` calls the function, which must be importable, in each of them."""

    def __init__(self, size: int):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = zygote()
        self.lines: list[Connection] = []
        self.processes = []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, port, there), daemon=True)
            process.start()
            there.close()
            self.lines.append(here)
            self.processes.append(process)

    def __call__(self, function: Callable[..., Any], *arguments: Any, patience: float = PATIENCE) -> list[Outcome]:
        """What came of it, by rank. The processes have the caller's environment meanwhile."""
        surroundings = {name: value for name, value in os.environ.items() if name not in LAUNCHERS}
        for line in self.lines:
            line.send((function, arguments, surroundings))
        found: dict[int, Outcome] = {}
        end = time.monotonic() + patience
        while len(found) < len(self.lines):
            ready = wait([line for rank, line in enumerate(self.lines) if rank not in found], end - time.monotonic())
            if not ready:
                break
            for line in ready:
                rank = self.lines.index(line)  # type: ignore[arg-type]
                try:
                    found[rank] = line.recv()  # type: ignore[union-attr]
                except EOFError:
                    found[rank] = Outcome(None, True, "", f"rank {rank} has died\n")
                if found[rank].failed:
                    end = min(end, time.monotonic() + GRACE)
        outcomes = [found.get(rank, Outcome(None, True, "", f"rank {rank} hangs\n")) for rank in range(len(self.lines))]
        lost = any(outcome.value is None and outcome.failed for outcome in outcomes)
        if lost or (len(outcomes) > 1 and any(outcome.failed for outcome in outcomes)):
            self.close()
        return outcomes

    def close(self) -> None:
        """End the processes; the next `pool` of this size is another one."""
        for size, known in list(_pools.items()):
            if known is self:
                del _pools[size]
        for process in self.processes:
            process.kill()
            process.join()


def zygote() -> Any:
    """Context whose processes are forked off one that has imported the libraries: that takes 10 s, a fork none."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    multiprocessing.set_forkserver_preload(["tests.ranks", "eva_mim.run.stage", *PROGRAMS, *SLOW_TO_IMPORT])
    return multiprocessing.get_context("forkserver")


def pool(size: int) -> Pool:
    """The session's processes, started when first asked for."""
    if size not in _pools:
        _pools[size] = Pool(size)
    return _pools[size]


def on_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What a function returns on each of `size` ranks. A rank that raises, dies or hangs fails the test."""
    outcomes = pool(size)(function, *arguments)
    assert not any(outcome.failed for outcome in outcomes), "\n".join(outcome.err for outcome in outcomes)
    return [outcome.value for outcome in outcomes]


def program(module: str, words: list[str]) -> None:
    """`python -m MODULE WORDS` by its `main`, for a pool to call."""
    sys.exit(import_module(module).main(words))


class Launched:
    """A process of its own, in a session of its own: it can be killed, and its exit code is the system's. It is spared the import
    of the libraries, no more. The methods are those of `subprocess.Popen`."""

    def __init__(
        self, function: Callable[..., Any], *arguments: Any, log: str | os.PathLike[str] = os.devnull, network: str | None = None,
        host: str | None = None, **surroundings: str,
    ):
        """`log`: file for what it says. `network`: name of the network namespace that it lives in. `host`: name that its host has
        for it, which takes rights. `surroundings`: more environment."""
        kept = {name: value for name, value in os.environ.items() if name not in LAUNCHERS} | surroundings
        own = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        self.process = zygote().Process(target=_launched, args=(function, arguments, kept | own, os.fspath(log), network, host))
        self.process.start()
        assert self.process.pid is not None
        self.pid: int = self.process.pid

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self.process.exitcode

    def wait(self, timeout: float) -> int:
        """Its exit code, once it has ended."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still at work after {timeout:.0f} s"
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        """A signal to it alone."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, to it alone."""
        self.send_signal(signal.SIGKILL)


def ends(module: str, words: list[str]) -> None:
    """`python -m MODULE WORDS` to its end, for `Launched`."""
    from eva_mim.run.program import leave

    leave(import_module(module).main(words))


def script(text: str, *words: str) -> None:
    """`python -c TEXT WORDS`, for `Launched`."""
    sys.argv = ["-c", *words]
    exec(compile(text, "<script>", "exec"), {"__name__": "__main__"})


def _launched(
    function: Callable[..., Any], arguments: tuple[Any, ...], surroundings: dict[str, str], log: str, network: str | None,
    host: str | None,
) -> None:
    os.setsid()
    if network is not None:
        _enter(network)
    if host is not None:
        _system("unshare", CLONE_NEWUTS)
        socket.sethostname(host)
    multiprocessing.set_start_method("fork", force=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(surroundings)
    number = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(number, 1)
    os.dup2(number, 2)
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
    import torch

    torch.set_num_threads(1)
    try:
        function(*arguments)
    finally:
        atexit._run_exitfuncs()  # as at the end of a program; a process of multiprocessing leaves them out


def _enter(network: str) -> None:
    """What `ip netns exec` does for a program (`os.setns` came with Python 3.12)."""
    with open(f"/run/netns/{network}", "rb") as file:
        _system("setns", file.fileno(), CLONE_NEWNET)


def _system(name: str, *arguments: int) -> None:
    """A function of the C library that Python 3.10 does not have."""
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments):
        raise OSError(ctypes.get_errno(), name)


def _serve(rank: int, size: int, port: int, line: Connection) -> None:
    own = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    if size > 1:
        own |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port)}
    os.environ.update(own)
    multiprocessing.set_start_method("fork", force=True)  # that of a program, not of the process that this is a fork of
    multiprocessing.current_process().daemon = False  # here, so that programs may start processes of their own
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the tests, whose end is the end of this
    import torch

    from eva_mim.core.distributed import setup

    torch.set_num_threads(1)
    setup("cpu")
    linear = torch.nn.functional.linear
    gc.collect()
    gc.freeze()
    while True:
        try:
            function, arguments, surroundings = line.recv()
        except EOFError:
            return
        os.environ.clear()
        os.environ.update(surroundings | own)
        line.send(_called(function, arguments))
        torch.nn.functional.linear = linear  # DeepSpeed's ZeRO 3 puts its own in the place, which rounds otherwise
        gc.collect()


def _called(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Outcome:
    out, err = io.StringIO(), io.StringIO()
    failed, value = False, None
    with redirect_stdout(out), redirect_stderr(err):
        try:
            value = function(*arguments)
        except SystemExit as end:
            value = end.code or 0
            failed = bool(value)
        except BaseException:
            failed, value = True, 1
            traceback.print_exc()
    return Outcome(value, failed, out.getvalue(), err.getvalue())
