"""What checkpoints cost a run: seconds for which saving holds training, of which the rest is written in the background.

    python -m tools.checkpoint_cost [--model vit_base_patch16_224] [--batch 4] [--every 10] [--saves 3] [--folder DIR]

Weights, two moments and an average, as a run with AdamW and `run.ema_decay` keeps them, on the GPU where there is one. The same
steps are trained without checkpoints, with checkpoints that hold training until they are written, and with those of a run.
"share" is that of saving in this short run; "5 %" the time between checkpoints at which it is a twentieth.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import eva_mim.trunks.small  # noqa: F401
from eva_mim.core.contracts import Rates, StateGroup
from eva_mim.core.devices import pick_device
from eva_mim.core.losses import LossTerm, StepOutput
from eva_mim.engine import RunSettings, build_engine
from eva_mim.optim import OptimSettings
from eva_mim.run import checkpoints as snapshot
from eva_mim.weights.files.write import bytes_of


class Student(nn.Module):
    """A trunk of timm's."""

    def __init__(self, name: str):
        super().__init__()
        self.trunk = timm.create_model(name, num_classes=0)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, D]."""
        features: Tensor = self.trunk(images)
        return features


class Squares:
    """The mean square of the features of random images."""

    def prepare(self, student: nn.Module, batches: list[Tensor]) -> list[Tensor]:
        """Returns the micro-batches as they are."""
        return batches

    def loss(self, student: nn.Module, batch: Tensor) -> StepOutput:
        """Returns the mean square over a micro-batch."""
        return StepOutput({"loss": LossTerm(student(batch).square().mean())}, {})

    def counts(self, batch: Tensor) -> dict[str, Tensor]:
        """Returns no counts: micro-batches have one size."""
        return {}


def trained(step: Callable[[], None], parts: Callable[[], dict[str, StateGroup]], folder: Path, options: Any) -> dict[str, float]:
    """Seconds of the steps, of the saves, and of the last write after its save."""
    writer, steps, held = snapshot.Writer(folder, keep_last=1), 0.0, 0.0
    for number in range(options.saves * options.every):
        began = time.perf_counter()
        step()
        steps += time.perf_counter() - began
        if (number + 1) % options.every == 0 and options.saving:
            began = time.perf_counter()
            writer.save(number + 1, parts(), {})
            held += time.perf_counter() - began
    began = time.perf_counter()
    writer.finish()
    rest = time.perf_counter() - began
    writer.close()
    return {"step": steps / (options.saves * options.every), "held": held / options.saves, "rest": rest,
            "share": held / (steps + held)}


def main(argv: list[str] | None = None) -> int:
    """Prints a table."""
    parser = argparse.ArgumentParser(prog="python -m tools.checkpoint_cost", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="vit_base_patch16_224", help="timm's name")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default the temporary folder's")
    options = parser.parse_args(argv)
    device = pick_device("auto")
    student = Student(options.model)
    images = torch.randn(options.batch, 3, *student.trunk.patch_embed.img_size, device=device)
    engine = build_engine(student, RunSettings(epochs=1, global_batch=options.batch), OptimSettings(lr=1e-6), device)
    average = ModelEmaV3(engine.module, decay=0.999)

    def step() -> None:
        engine.step(Squares(), [images], Rates(1e-6, 0.05))
        average.update(engine.module)
        if device.type == "cuda":
            torch.cuda.synchronize()

    def parts() -> dict[str, StateGroup]:
        return engine.state() | {"ema": snapshot.kept_here(average.module.state_dict())}

    folder = Path(tempfile.mkdtemp(prefix="checkpoint-cost-", dir=options.folder))
    for _ in range(3):
        step()
    size = sum(bytes_of(part.kinds) for part in parts().values())
    say, room = sys.stdout.write, snapshot.ROOM
    say(f"{options.model}, batch {options.batch}, on {device.type}: {size:,} bytes a checkpoint, every {options.every} steps\n")
    say(f"{'':<12} {'s/step':>8} {'held s/save':>12} {'rest of the last s':>19} {'share':>7} {'5 %: every s':>13}\n")
    for name in ("none", "held", "background"):
        options.saving, snapshot.ROOM = name != "none", room if name == "background" else 0.0
        found = trained(step, parts, folder, options)
        say(f"{name:<12} {found['step']:>8.3f} {found['held']:>12.3f} {found['rest']:>19.3f} {found['share']:>7.1%} "
            f"{found['held'] / 0.05:>13.1f}\n")
        sys.stdout.flush()
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
