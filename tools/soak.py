"""A run of several hundred steps that is killed again and again, and must end like one that was left alone, bit for bit.

    python -m tools.soak [--kills 40] [--minutes 30] [--seed 0] [--processes 1] [--out FOLDER] [a.b=c ...]

Each kill is a SIGKILL to all processes of the run, at a random moment: while it starts, between steps, or while a checkpoint is
being written; then the same command is given again. Among them the disk of the checkpoints, a small one in memory, fills up
while one is written: the run must stop by itself, say so, and leave a whole checkpoint; room is made, and the same command is
given. A run that ends before the last kill is compared, and another one begins. When the minutes are over, no more kills come and
the run goes to its end. Exit code 0: every run ended as the undisturbed one, and with eight kills or more each kind was met.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from eva_mim.run import checkpoints as snapshot

RECIPE: dict[str, Any] = {
    "data": {"source": "scenes", "scenes": {"size": 32, "train": 240, "val": 48, "labels": "coarse"}, "workers": 0},
    "student": {"name": "vit_nano_patch4_32", "drop_path": 0.1},
    "teacher": {"kind": "timm", "name": "vit_nano_patch4_32"},
    "optim": {"lr": 2e-3, "warmup_epochs": 1, "clip_grad": 1.0, "layer_decay": 0.8},
    "run": {
        "epochs": 30, "global_batch": 24, "precision": "fp32", "device": "cpu", "log_every": 4, "checkpoint_every": 3,
        "keep_every": 60, "evaluate_steps": 50, "ema_decay": 0.9,
    },
}
"""300 steps of less than 0.1 s."""
HALF, FULL = "a half-written checkpoint", "a full disk"
KINDS = {"while starting": 1, "between steps": 3, HALF: 3, FULL: 1}
"""When a kill comes -> how often among eight."""
DISK = "120m"
"""Of the checkpoints: 15 of them."""
CLOCK = ("time", "images_per_s")
PATIENCE = 300.0
"""Seconds after which a run that does not get on is an error."""


class Soak:
    """One command, given until it comes to its end."""

    def __init__(self, folder: Path, processes: int, settings: list[str]):
        self._recipe, self._settings, self._launcher = folder / "recipe.yaml", settings, [sys.executable, "-m"]
        self._stopped = {2} if processes == 1 else {1}  # torchrun has a code of its own for a failed rank
        folder.mkdir(parents=True, exist_ok=True)
        self._recipe.write_text(yaml.safe_dump(RECIPE))
        if processes > 1:
            self._launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
            self._settings = ["run.engine=deepspeed", "run.zero_stage=2", *settings]

    def start(self, out: Path) -> subprocess.Popen[bytes]:
        """What the run says is kept in `soak.log`."""
        out.mkdir(parents=True, exist_ok=True)
        line = [*self._launcher, "pretrain.mim", str(self._recipe), *self._settings, "--out", str(out)]
        with (out / "soak.log").open("ab") as log:
            return subprocess.Popen(line, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})

    def finish(self, out: Path) -> None:
        """Let the run come to its end."""
        _check(self.start(out).wait(), out)

    def strike(self, out: Path, kind: str, draw: random.Random, usual: float) -> str | None:
        """Start and kill; returns what was hit, None when the run ended before. `usual`: seconds that a start takes."""
        process, launched, chance = self.start(out), time.time(), draw.random()
        checkpoints = out / "checkpoints"
        if kind == "while starting":
            _wait(process, lambda: time.time() > launched + usual * chance)
        else:
            _wait(process, lambda: _begun(out, launched))
            begun = time.time()
        if kind == "between steps":
            _wait(process, lambda: time.time() > begun + 1.5 * chance)
        elif kind in (HALF, FULL):
            if kind == FULL:
                _wait(process, lambda: bool(_newest(checkpoints)))
            for _ in range(draw.randrange(3)):
                before = _newest(checkpoints)
                _wait(process, lambda before=before: _newest(checkpoints) != before)  # type: ignore[misc]
            _wait(process, lambda: _half_written(checkpoints, launched))
            time.sleep(0.01 * chance)
        if kind == FULL and process.poll() is None:
            return self._filled(process, out, checkpoints)
        if process.poll() is not None:
            _check(process.returncode, out)
            return None
        for number in _family(process.pid):
            os.kill(number, signal.SIGKILL)
        process.wait()
        return HALF if _half_written(checkpoints, launched) else "while saving" if kind == HALF else kind

    def _filled(self, process: subprocess.Popen[bytes], out: Path, checkpoints: Path) -> str | None:
        """The disk is full until the run stops."""
        filler, said = checkpoints / "filler", (out / "soak.log").stat().st_size
        with filler.open("wb") as file, suppress(OSError):  # the run may be faster
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(checkpoints).free)
        _wait(process, lambda: False)
        filler.unlink()
        if process.returncode == 0:
            return None
        text = (out / "soak.log").read_bytes()[said:].decode()
        if process.returncode not in self._stopped or "was not saved" not in text or "Traceback" in text.split("error: ")[0]:
            _check(process.returncode, out)
        if any(checkpoints.glob("tmp-*")) or snapshot.newest(out) is None:
            sys.exit(f"{out}: a full disk has cost more than one checkpoint")
        return FULL


def _check(code: int, out: Path) -> None:
    if code:
        sys.exit(f"{out}: exit code {code}; it says:\n{(out / 'soak.log').read_text()[-3000:]}")


def _wait(process: subprocess.Popen[bytes], ready: Callable[[], bool]) -> None:
    """Until it is so, or the run has ended."""
    late = time.time() + PATIENCE
    while process.poll() is None and not ready():
        if time.time() > late:
            sys.exit(f"nothing happens for {PATIENCE:g} s")
        time.sleep(0.001)


def _begun(out: Path, launched: float) -> bool:
    rows = _records(out)
    return bool(rows) and rows[-1]["time"] > launched


def _records(out: Path) -> list[dict[str, Any]]:
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _newest(checkpoints: Path) -> str:
    return max((path.name for path in checkpoints.glob("step-*")), default="")


def _half_written(checkpoints: Path, launched: float) -> bool:
    """By this process, not by one that was killed before."""
    times = []
    for path in checkpoints.glob("tmp-*"):
        with suppress(OSError):  # renamed meanwhile
            times.append(path.stat().st_mtime)
    return any(time > launched for time in times)


def _family(number: int) -> list[int]:
    """A process and all that it started."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            children.setdefault(int(path.read_text().rpartition(")")[2].split()[1]), []).append(int(path.parent.name))
    found = [number]
    for one in found:
        found += children.get(one, [])
    return found


@contextmanager
def small_disk(place: Path) -> Iterator[bool]:
    """A file system in memory; False without the right to mount one."""
    place.mkdir(parents=True)
    line = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(place)]
    mounted = shutil.which("mount") is not None and subprocess.run(line, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(place)], check=True)


def differences(out: Path, straight: Path) -> list[str]:
    """What two finished runs do not have in common, bit for bit: exports, the last checkpoint, figures."""
    last = Path("checkpoints") / _newest(straight / "checkpoints")
    files = ["model.safetensors", "head.safetensors", "ema/model.safetensors"]
    files += [str(last / path.name) for path in (straight / last).glob("*.safetensors")]
    wrong = []
    for name in files:
        one, other = load_file(out / name), load_file(straight / name)
        same = one.keys() == other.keys() and all(torch.equal(one[key], value) for key, value in other.items())
        wrong += [] if same else [name]
    rows = [[{name: value for name, value in row.items() if not name.startswith(CLOCK)} for row in _records(folder)
             if row["kind"] != "start"] for folder in (out, straight)]
    return wrong + ([] if rows[0] == rows[1] else ["metrics.jsonl"])


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.soak", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=40, help="at least")
    parser.add_argument("--minutes", type=float, default=30.0, help="for everything; a last run to the end is reserved")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--processes", type=int, default=1, help="more than one: DeepSpeed, ZeRO 2")
    parser.add_argument("--out", type=Path, help="a new folder, which is kept; default a temporary one")
    parser.add_argument("settings", nargs="*", metavar="a.b=c")
    options = parser.parse_intermixed_args(argv)
    folder = options.out or Path(tempfile.mkdtemp(prefix="soak-"))
    soak, draw, began = Soak(folder, options.processes, options.settings), random.Random(options.seed), time.time()
    straight = folder / "straight"
    soak.finish(straight)
    usual = _records(straight)[0]["time"] - began
    say = sys.stdout.write
    steps = _records(straight)[-1]["step"]
    say(f"undisturbed: {steps} steps in {time.time() - began:.0f} s, of which {usual:.1f} s to start\n")
    hits, failed, runs, deadline = Counter[str](), False, 0, began + 60 * options.minutes - (time.time() - began)
    deck, owed = list[str](), set[str]()

    def left() -> bool:
        return time.time() < deadline and (hits.total() < options.kills or bool(owed - set(hits)))

    while left():
        runs += 1
        out = folder / f"run-{runs}"
        with small_disk(out / "checkpoints") as mounted:
            kinds = {kind: count for kind, count in KINDS.items() if mounted or kind != FULL}
            owed = set(kinds) if options.kills >= sum(KINDS.values()) else set()
            while left():
                deck = deck or draw.sample(list(kinds), sum(kinds.values()), counts=list(kinds.values()))
                hit = soak.strike(out, deck[-1], draw, usual)
                if hit is None:
                    break
                if hit != "while saving":  # else it was too late, and comes again
                    deck.pop()
                hits[hit] += 1
                say(f"kill {hits.total():>3}  {hit:<26} {_newest(out / 'checkpoints') or 'no checkpoint'}\n")
                sys.stdout.flush()
            soak.finish(out)
            wrong = differences(out, straight)
        failed |= bool(wrong)
        say(f"run {runs}: {'NOT like the undisturbed one: ' + ', '.join(wrong) if wrong else 'equal, bit for bit'}\n")
        if not mounted:
            say("no disk was filled: mounting a tmpfs takes rights that this process does not have\n")
    say(f"\n{'hit':<28} kills\n" + "".join(f"{kind:<28} {count:>5}\n" for kind, count in sorted(hits.items())))
    say(f"{'all':<28} {hits.total():>5}   {runs} runs of {steps} steps, {time.time() - began:.0f} s, seed {options.seed}\n")
    if not runs or owed - set(hits):
        failed = True
        say(f"no time was left for {', '.join(sorted(owed - set(hits))) or 'a kill'}: give more --minutes, or fewer steps "
            "(run.epochs=4)\n")
    if options.out is None and not failed:
        shutil.rmtree(folder)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
