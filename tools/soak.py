"""A run of several hundred steps that is killed again and again, and must end like one that was left alone, bit for bit.

    python -m tools.soak [--kills 40] [--minutes 30] [--seed 0] [--processes 1] [--out FOLDER] [a.b=c ...]

Each kill is a SIGKILL to all processes of the run, at a random moment: while it starts, between steps, or while a checkpoint is
being written; then the same command is given again. A run that ends before the last kill is compared, and another one begins.
When the minutes are over, no more kills come and the run goes to its end. Exit code 0: every run ended as the undisturbed one.
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
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

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
KINDS = {"while starting": 1, "between steps": 4, "while saving": 4}
"""When a kill comes -> how often."""
CLOCK = ("time", "images_per_s")
PATIENCE = 300.0
"""Seconds after which a run that does not get on is an error."""


class Soak:
    """One command, given until it comes to its end."""

    def __init__(self, folder: Path, processes: int, settings: list[str]):
        self._recipe, self._settings, self._launcher = folder / "recipe.yaml", settings, [sys.executable, "-m"]
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
        elif kind == "while saving":
            for _ in range(draw.randrange(3)):
                before = _newest(checkpoints)
                _wait(process, lambda before=before: _newest(checkpoints) != before)  # type: ignore[misc]
            _wait(process, lambda: _half_written(checkpoints))
            time.sleep(0.03 * chance)
        if process.poll() is not None:
            _check(process.returncode, out)
            return None
        for number in _family(process.pid):
            os.kill(number, signal.SIGKILL)
        process.wait()
        return "a half-written checkpoint" if _half_written(checkpoints) else kind


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


def _half_written(checkpoints: Path) -> bool:
    return any(checkpoints.glob("tmp-*"))


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
    parser.add_argument("--kills", type=int, default=40)
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
    while hits.total() < options.kills and time.time() < deadline:
        runs += 1
        out = folder / f"run-{runs}"
        while hits.total() < options.kills and time.time() < deadline:
            hit = soak.strike(out, draw.choices(list(KINDS), list(KINDS.values()))[0], draw, usual)
            if hit is None:
                break
            hits[hit] += 1
            say(f"kill {hits.total():>3}  {hit:<26} {_newest(out / 'checkpoints') or 'no checkpoint'}\n")
            sys.stdout.flush()
        soak.finish(out)
        wrong = differences(out, straight)
        failed |= bool(wrong)
        say(f"run {runs}: {'NOT like the undisturbed one: ' + ', '.join(wrong) if wrong else 'equal, bit for bit'}\n")
    say(f"\n{'hit':<28} kills\n" + "".join(f"{kind:<28} {count:>5}\n" for kind, count in sorted(hits.items())))
    say(f"{'all':<28} {hits.total():>5}   {runs} runs of {steps} steps, {time.time() - began:.0f} s, seed {options.seed}\n")
    if not runs:
        failed = True
        say("no time was left for a kill: give more --minutes, or fewer steps (run.epochs=4)\n")
    if options.out is None and not failed:
        shutil.rmtree(folder)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
