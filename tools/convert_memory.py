"""What `eva-mim convert` takes for a checkpoint of some gigabytes, and a failure when that is more memory than it should.

    python -m tools.convert_memory [--gigabytes 5] [--architecture eva_giant_patch14_224] [--bound 1.3] [--folder DIR]

A model of timm, as deep as the size needs and with drawn weights, is written under the original names (torch file, container
`module`), converted to timm (safetensors), and that to EVA again (torch file). Exit code 0: both runs stay below `bound` times
the size of their source; 1: one does not, or fails.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import timm
import torch
from torch import Tensor

from eva_mim.trunks.meta import meta_device
from eva_mim.weights.files.lazy import Deferred
from eva_mim.weights.files.write import write_torch
from eva_mim.weights.names.buffers import Rope
from eva_mim.weights.names.eva import to_eva


def on_meta(name: str, depth: int) -> dict[str, Tensor]:
    """Names and shapes of the model."""
    with meta_device():
        weights: dict[str, Tensor] = timm.create_model(name, depth=depth, num_classes=0).state_dict()
    return weights


def depth_of(name: str, size: float) -> int:
    """Returns the number of blocks whose fp32 weights take about `size` bytes."""
    one, two = (sum(value.nbytes for value in on_meta(name, depth).values()) for depth in (1, 2))
    return max(1, round((size - one) / (two - one)) + 1)


def write(path: Path, name: str, depth: int) -> None:
    """A checkpoint under the original names, drawn tensor by tensor; norms are about 1, so that the images are not lost."""

    def drawn(key: str, value: Tensor) -> Tensor:
        return torch.randn(value.shape) * 0.02 + float(key.endswith("weight") and value.ndim == 1)

    weights = {key: Deferred(value, partial(drawn, key, value)) for key, value in on_meta(name, depth).items()}
    rope = Rope(64, 16) if name.startswith("eva02") else None  # of every released EVA-02 classifier
    write_torch(path, to_eva(weights, grid=(16, 16), rope=rope).weights, container="module")


def measured(source: Path, result: Path, to: str, name: str, depth: int) -> tuple[int, float, int]:
    """(peak of resident memory in bytes, seconds, exit code) of the command in a process of its own.

    The kernel counts mapped files with it, but not its cache of files. A child's figure starts at its parent's size.
    """
    line = [sys.executable, "-m", "eva_mim.cli", "convert", str(source), str(result), "--to", to]
    line += ["--architecture", name, "--argument", f"depth={depth}"]
    started = time.monotonic()
    child = subprocess.Popen(line, stdout=sys.stderr)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_maxrss * 1024, time.monotonic() - started, child.returncode


def main() -> int:
    """Write, convert there and back, print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=5.0, help="size of the checkpoint")
    parser.add_argument("--architecture", default="eva_giant_patch14_224", help="of timm, without relative positions")
    parser.add_argument("--bound", type=float, default=1.3, help="largest peak of memory, over the size of the source")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where 2.1 times the size is free")
    arguments = parser.parse_args()
    size, free = arguments.gigabytes * 1e9, shutil.disk_usage(arguments.folder).free
    if free < 2.1 * size:
        sys.stderr.write(f"{arguments.folder}: {free / 1e9:.1f} GB are free, {2.1 * size / 1e9:.1f} are needed\n")
        return 1
    torch.manual_seed(0)
    model, failed = arguments.architecture, False
    depth = depth_of(model, size)
    lines = [f"{model} with {depth} blocks", f"{'':<24}{'size':>9}{'peak':>9}{'ratio':>7}{'seconds':>9}"]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as home:
        source = Path(home) / "original.pt"
        write(source, model, depth)
        for to, file in (("timm", "timm.safetensors"), ("eva", "back.pt")):
            result = Path(home) / file
            peak, seconds, code = measured(source, result, to, model, depth)
            size = source.stat().st_size
            ratio = peak / size
            failed |= code != 0 or ratio > arguments.bound
            lines.append(f"{f'{source.name} --to {to}':<24}{size / 1e9:>6.2f} GB{peak / 1e9:>6.2f} GB{ratio:>7.2f}"
                         f"{seconds:>9.0f}{'' if code == 0 else f'  failed: exit code {code}'}")
            if code:
                break
            source.unlink()
            source = result
    sys.stdout.write("\n".join(lines) + f"\nbound {arguments.bound}: {'FAIL' if failed else 'ok'}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
