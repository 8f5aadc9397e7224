"""A program in a fork is for its caller what a program started anew is."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import forked
from tests.tiny import environment

PROGRAM = """
import atexit, json, os, signal, sys, threading, time
print(json.dumps([sys.argv[1:], __name__, os.getcwd(), os.environ["WORD"], sys.stdin.read(), os.getsid(0) == os.getpid()]))
atexit.register(lambda: print("last words"))
threading.Thread(target=lambda: (time.sleep(0.2), print("a thread ends first"))).start()
match sys.argv[1]:
    case "number": sys.exit(3)
    case "text": sys.exit("no more")
    case "error": raise ValueError("broken")
    case "killed": os.kill(os.getpid(), signal.SIGKILL)
    case "child": sys.exit(__import__("subprocess").call([sys.executable, "-m", "program", "number"], stdin=-3))
"""


def outcome(library: Any, folder: Path, way: str) -> tuple[Any, ...]:
    """(exit code, output, last line of errors)"""
    process = library.Popen(
        [sys.executable, "-m", "program", way, "b c"], cwd=folder, env=environment() | {"WORD": "w", "PYTHONPATH": str(folder)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=way != "child",
    )
    out, err = process.communicate("asked\n", timeout=100)
    return process.returncode, out, err.splitlines()[-1:]


@pytest.mark.slow
def test_a_fork_is_to_its_caller_what_a_new_process_is(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    codes = {"well": 0, "number": 3, "text": 1, "error": 1, "killed": -9, "child": 3}
    for way, code in codes.items():
        found = outcome(forked, tmp_path, way)
        assert found == outcome(subprocess, tmp_path, way)
        assert found[0] == code
    words, name, place, word, given, alone = json.loads(outcome(forked, tmp_path, "well")[1].splitlines()[0])
    assert (words, name, place, word, given, alone) == (["well", "b c"], "__main__", str(tmp_path), "w", "asked\n", True)


@pytest.mark.slow
def test_a_fork_can_be_waited_for_and_stopped(tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text("import time; time.sleep(600)")
    process = forked.Popen([sys.executable, "-m", "sleeper"], cwd=tmp_path, env=environment())
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.1)
    process.terminate()
    assert process.wait(100) == process.poll() == -signal.SIGTERM
    assert process.args[0] == sys.executable
    assert process._server is not None
