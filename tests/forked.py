"""Programs in copies of a process that has the libraries loaded: importing them is most of what a tiny run costs.

`Popen` takes what `subprocess.Popen` takes. A line `PYTHON -m MODULE ...` becomes a fork of one server, which has imported torch
and the rest and has no threads; what the module starts by such lines (torchrun its ranks) comes from the same server. Arguments,
environment, streams, session, signals and exit code are those of a process of its own. Left out is how Python takes all objects
apart at its end, which here takes as long as a tiny run: every page becomes a copy. Seeds of hashing and of global generators are
alike in all copies: that a run does not depend on them is seen where programs really start (`tests/test_resume.py`,
`tools/soak.py`).
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import selectors
import socket
import subprocess
import sys
import threading
from typing import Any

ADDRESS = "EVA_MIM_TESTS_FORKED"
"""Environment variable with the server's address."""
LIBRARIES = ("torch", "torch.distributed.run", "timm", "open_clip", "deepspeed", "tensorboard", "torch.utils.tensorboard")
PROGRAMS = (
    "eva_mim.cli", "eva_mim.pipeline", "eva_mim.evaluate", "pretrain.mim", "pretrain.clip", "finetune.classify", "finetune.probe",
)
REPOSITORY = os.path.dirname(os.path.dirname(__file__))
MAX_REQUEST = 1 << 20


class Popen(subprocess.Popen):  # type: ignore[type-arg]
    """A fork for lines of `python -m`, a process as usual for others."""

    _server: socket.socket | None = None

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, close_fds: Any, pass_fds: Any, cwd: Any, env: Any,
                       *rest: Any) -> None:
        line = [os.fspath(word) for word in args] if isinstance(args, (list, tuple)) else []
        while line[1:2] == ["-u"]:
            del line[1]
        if line[:2] != [sys.executable, "-m"] or not hasattr(os, "pidfd_open"):
            super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest)  # type: ignore[misc]
            return
        # ... startupinfo, creationflags, shell, six pipe ends, restore_signals, gid, gids, uid, umask, start_new_session
        ends, new_session = rest[3:9], rest[14]
        child = [end if end != -1 else stream for end, stream in zip((ends[0], ends[3], ends[5]), (0, 1, 2), strict=True)]
        surroundings = dict(os.environ if env is None else env)
        place = os.fspath(cwd or os.getcwd())
        request = json.dumps({"line": line[2:], "env": surroundings, "cwd": place, "session": new_session})
        server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            server.connect(address())
            socket.send_fds(server, [request.encode()], child)
            self.pid = json.loads(server.recv(100))
        except ConnectionError:  # it has said why there is no server
            server.close()
            super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest)  # type: ignore[misc]
            return
        self._server, self._child_created = server, True
        self._close_pipe_fds(*ends)  # type: ignore[attr-defined]

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if self._server is None:
            return super()._try_wait(wait_flags)  # type: ignore[misc,no-any-return]
        try:
            return self.pid, json.loads(self._server.recv(100, socket.MSG_DONTWAIT if wait_flags & os.WNOHANG else 0))
        except BlockingIOError:
            return 0, 0

    def _internal_poll(self, _deadstate: int | None = None, **_: Any) -> int | None:
        if self._server is None:
            return super()._internal_poll(_deadstate)  # type: ignore[misc,no-any-return]
        if self.returncode is None:
            pid, status = self._try_wait(os.WNOHANG)
            if pid:
                self._handle_exitstatus(status)  # type: ignore[attr-defined]
        return self.returncode


def run(line: list[str], timeout: float, **options: Any) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` with text."""
    with Popen(line, text=True, **options) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
        return subprocess.CompletedProcess(line, process.wait(), out, err)


def address() -> str:
    """Of the server, which is started when there is none. It ends with the process that has started it."""
    if ADDRESS not in os.environ:
        name = f"\0eva-mim-tests-{os.getpid()}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(name)
            listener.listen(64)
            os.environ[ADDRESS] = name[1:]
            surroundings = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
            line = [sys.executable, "-m", "tests.forked", str(listener.fileno())]
            server = subprocess.Popen(line, env=surroundings, stdin=subprocess.PIPE, pass_fds=[listener.fileno()], cwd=REPOSITORY)
        atexit.register(server.communicate)
    return "\0" + os.environ[ADDRESS]


def serve(listener: socket.socket) -> dict[str, Any]:
    """Fork for each request until standard input closes; returns, in each fork, what it is to do."""
    with selectors.DefaultSelector() as waiting:
        waiting.register(listener, selectors.EVENT_READ)
        waiting.register(0, selectors.EVENT_READ)
        while True:
            for key, _ in waiting.select():
                if key.fd == 0:
                    sys.exit()
                if key.fileobj is not listener:
                    process, line = key.data
                    line.send(json.dumps(os.waitpid(process, 0)[1]).encode())
                    waiting.unregister(key.fd)
                    os.close(key.fd)
                    line.close()
                    continue
                line, _ = listener.accept()
                content, streams, _, _ = socket.recv_fds(line, MAX_REQUEST, 3)
                request: dict[str, Any] = json.loads(content)
                if process := os.fork():
                    line.send(json.dumps(process).encode())
                    for stream in streams:
                        os.close(stream)
                    waiting.register(os.pidfd_open(process), selectors.EVENT_READ, (process, line))
                    continue
                for other in waiting.get_map().values():
                    if other.data:
                        other.data[1].close()
                        os.close(other.fd)
                line.close()
                listener.close()
                for number, stream in enumerate(streams):
                    os.dup2(stream, number)
                    os.close(stream)
                return request


def become(request: dict[str, Any]) -> None:
    """Run the module of a request in this process."""
    if request["session"]:
        os.setsid()
    os.chdir(request["cwd"])
    own = os.environ[ADDRESS]
    os.environ.clear()
    os.environ.update(request["env"] | {ADDRESS: own})
    module, *words = request["line"]
    sys.argv = [module, *words]
    sys.path[:0] = [request["cwd"], *filter(None, request["env"].get("PYTHONPATH", "").split(os.pathsep))]
    subprocess.Popen = Popen  # type: ignore[misc]
    sys.modules["torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler"].Popen = Popen  # type: ignore[attr-defined]
    code: Any = None
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:  # any other exception ends Python as usual
        code = end.code
    if code is not None and not isinstance(code, int):
        sys.stderr.write(f"{code}\n")
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit((code or 0) if isinstance(code, int | None) else 1)


if __name__ == "__main__":
    import importlib

    for name in LIBRARIES + PROGRAMS:
        importlib.import_module(name)
    for name in ("torch.distributed.run", *PROGRAMS):  # they are to run, and what they have loaded stays
        del sys.modules[name]
    gc.collect()
    gc.freeze()  # no collection in a copy looks at, and so copies, what all have
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        sys.exit(f"the libraries have started {threads - 1} threads: no process with threads is forked")
    become(serve(socket.socket(fileno=int(sys.argv[1]))))
