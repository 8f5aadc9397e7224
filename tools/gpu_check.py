"""Checks on one GPU what the tests can only pretend: faults first, then figures. JSON out; under eight minutes.

    python -m tools.gpu_check [--only PART ...] [--out gpu.json] [--tiny] [--device cuda]

Each part runs in a process of its own with a limit of its own, and is printed as it ends; a part that fails or takes too long
does not stop the others. Weights are random, data is drawn. Parts that need DeepSpeed or open_clip are skipped, by name, where
these are not installed. `--tiny --device cpu` runs the same code with small networks: a test of this tool.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

import eva_mim.trunks.small  # noqa: F401  registers the small architectures
from eva_mim.core.contracts import Rates
from eva_mim.core.devices import set_arithmetic
from eva_mim.core.files import write_json
from eva_mim.core.host_copy import to_host
from eva_mim.core.rng import seed_all
from eva_mim.core.settings import parse
from eva_mim.engine import build_engine
from eva_mim.optim import OptimSettings
from eva_mim.optim.optimizers import build_optimizer
from eva_mim.trunks.kernels import tune

Found = dict[str, Any]
DATA = {"source": "scenes", "scenes": {"size": 32, "train": 480, "val": 24, "labels": "coarse"}, "workers": 0}
RUN = {"epochs": 1, "global_batch": 24, "precision": "bf16", "log_every": 1, "evaluate_every": 99}
OPTIM = {"lr": 1e-3, "warmup_epochs": 1, "clip_grad": 1.0}
NANO = {"name": "vit_nano_patch4_32"}
MIM: dict[str, Any] = {"data": DATA, "run": RUN, "optim": OPTIM, "student": NANO, "teacher": {"kind": "timm", **NANO}}
VISIBLE = {"student": NANO | {"form": "visible"}, "mask": {"kind": "random", "ratio": 0.75}}
CLIP: dict[str, Any] = {
    "data": DATA | {"templates": ["a {}"]}, "run": RUN, "optim": OPTIM,
    "student": NANO | {"embed_dim": 32, "text": {"width": 32, "layers": 1, "heads": 2, "context_length": 12}},
}
CLASSIFY: dict[str, Any] = {"data": DATA, "run": RUN, "optim": OPTIM, "student": NANO}
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "mim": ("pretrain.mim", MIM),
    "mim, visible patches": ("pretrain.mim", MIM | VISIBLE),
    "mim, fp16, LAMB": ("pretrain.mim", MIM | {"run": RUN | {"precision": "fp16"}, "optim": OPTIM | {"optimizer": "lamb"}}),
    "clip": ("pretrain.clip", CLIP),
    "clip, 4 micro-batches": ("pretrain.clip", CLIP | {"run": RUN | {"micro_batch": 6}}),
    "classify, mixup": ("finetune.classify", CLASSIFY | {"mix": {"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1}}),
}
"""Program and settings; each is of a task's own way through a step."""
STEPS = 20


class Trainer:
    """Steps of a stage on a device."""

    def __init__(self, program: str, tree: dict[str, Any], device: torch.device):
        seed_all(0)
        module: Any = import_module(program)
        if device.type == "cpu":  # most processors have no units for less, and take minutes
            tree = tree | {"run": tree["run"] | {"precision": "fp32"}}
        recipe = parse(module.StageRecipe, tree, "gpu_check")
        set_arithmetic(deterministic=recipe.run.deterministic)
        parts = module.build(recipe, device).parts
        self.task, self.train, self.device = parts.task, parts.train, device
        tune(self.task.student, device)
        self.engine = build_engine(self.task.student, recipe.run, recipe.optim, device)

    def batches(self, steps: int) -> Iterator[list[Any]]:
        """Yields the micro-batches of so many steps, on the device."""
        for batches in self.train.steps(0, steps):
            yield [batch.to(self.device) for batch in batches]

    def step(self, batches: list[Any]) -> Any:
        """Makes a step."""
        return self.engine.step(self.task, batches, Rates(1e-3, 0.05))


@contextmanager
def waits_forbidden(device: torch.device) -> Iterator[None]:
    """In the block, what makes the host wait for a GPU raises."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def finished(device: torch.device) -> float:
    """Waits for the device; returns the time."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def machine(device: torch.device, tiny: bool) -> Found:
    """Versions, the card, and the attention kernels that are chosen."""
    found: Found = {"torch": torch.__version__, "cuda": torch.version.cuda, "device": str(device)}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {"card": card.name, "gigabytes": round(card.total_memory / 2**30, 1)}
        query = torch.randn(2, 12, 197, 64, device=device, dtype=torch.bfloat16)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            torch.nn.functional.scaled_dot_product_attention(query, query, query)
            finished(device)
        found["attention"] = [event.key[:60] for event in seen.key_averages()][:2]
    return found


def waits(device: torch.device, tiny: bool) -> Found:
    """A step of every task, after four, with waits forbidden: "none", or what waited."""
    found: Found = {}
    for name, (program, tree) in TASKS.items():
        if program == "pretrain.clip" and find_spec("open_clip") is None:
            found[name] = "skipped: no open_clip"
            continue
        trainer = Trainer(program, tree, device)
        *first, last = trainer.batches(5)
        for batches in first:
            trainer.step(batches)
        finished(device)
        try:
            with waits_forbidden(device):
                trainer.step(last)
            found[name] = "none"
        except RuntimeError as error:
            found[name] = str(error).split("\n")[0][:200]
    return found


def same_as_cpu(device: torch.device, tiny: bool) -> Found:
    """Loss and gradient norm of a first step in fp32 on the CPU, and here in fp32 and in bf16."""
    found: Found = {}
    for precision in ("fp32",) if tiny else ("fp32", "bf16"):
        tree = MIM | {"run": RUN | {"precision": precision}}
        said = []
        for place in (torch.device("cpu"), device):
            trainer = Trainer("pretrain.mim", tree, place)
            output = trainer.step(next(trainer.batches(1)))
            said.append((float(output.loss), float(output.metrics["grad_norm"])))
        found[precision] = {"loss": [one[0] for one in said], "grad_norm": [one[1] for one in said]}
    return found


def repeat(device: torch.device, tiny: bool) -> Found:
    """Largest difference of weights between two runs, and between one and a run that was stopped and went on; with and without
    `run.deterministic`."""
    found: Found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(_stage(device, checkpoint_every=STEPS // 2)))
        for deterministic in (False, True):
            setting = f"run.deterministic={str(deterministic).lower()}"
            outs = [folder / f"{number}-{deterministic}" for number in range(3)]
            for out in outs[:2]:
                _program("pretrain.mim", str(recipe), setting, "--out", str(out))
            half = f"checkpoints/step-{STEPS // 2:08d}"
            shutil.copytree(outs[0] / half, outs[2] / half)
            for file in ("lineage.json", "resolved.yaml"):
                shutil.copy(outs[0] / file, outs[2])
            record = json.loads((outs[2] / "lineage.json").read_text())
            write_json(outs[2] / "lineage.json", record | {"finished": False})
            _program("pretrain.mim", str(recipe), setting, "--out", str(outs[2]))
            first, *others = (load_file(out / "model.safetensors") for out in outs)
            found["deterministic" if deterministic else "usual"] = {
                what: max(float((first[key] - other[key]).abs().max()) for key in first)
                for what, other in zip(("again", "stopped and gone on"), others, strict=True)}
    return found


def one_process(device: torch.device, tiny: bool) -> Found:
    """Losses of DeepSpeed with ZeRO 0 to 3 in one process of torchrun against the local engine's: the largest difference."""
    if find_spec("deepspeed") is None:
        return {"skipped": "no deepspeed"}
    found: Found = {}
    with tempfile.TemporaryDirectory() as name:
        recipe = Path(name) / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(_stage(device, precision="fp32")))
        _program("pretrain.mim", str(recipe), "--out", f"{name}/local")
        for stage in (0,) if tiny else (0, 1, 2, 3):
            settings = ["run.engine=deepspeed", f"run.zero_stage={stage}"]
            _program("torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m", "pretrain.mim", str(recipe), *settings,
                     "--out", f"{name}/{stage}")
            both = [_losses(Path(name) / run) for run in ("local", str(stage))]
            found[f"ZeRO {stage}"] = max(abs(a - b) for a, b in zip(*both, strict=True))
    return found


def speed(device: torch.device, tiny: bool) -> Found:
    """Images a second of masked training, share of the time in which the GPU is idle, peak memory and the longest kernels."""
    found: Found = {}
    pairs = [("vit_nano_patch4_32", "vit_nano_patch4_32", 32)] if tiny else [
        (f"vit_{size}_patch16_224", "vit_large_patch14_clip_224", 224) for size in ("base", "large")]
    for student, teacher, side in pairs:
        for micro in (8,) if tiny else (64, 128, 256):
            tree = MIM | {
                "student": {"name": student}, "run": RUN | {"global_batch": micro},
                "teacher": {"kind": "timm", "name": teacher, "image_size": side if tiny else 196},
                "data": DATA | {"scenes": DATA["scenes"] | {"size": side, "train": micro}},  # type: ignore[operator]
            }
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            try:
                found[f"{student}, {micro}"] = _speed_of(Trainer("pretrain.mim", tree, device), micro, device)
            except torch.OutOfMemoryError:
                found[f"{student}, {micro}"] = "out of memory"
    return found


def _speed_of(trainer: Trainer, micro: int, device: torch.device) -> Found:
    batches = next(trainer.batches(1))
    for _ in range(3):
        trainer.step(batches)
    began = finished(device)
    for _ in range(10):
        trainer.step(batches)
    seconds = finished(device) - began
    found: Found = {"images_per_s": round(10 * micro / seconds, 1)}
    if device.type == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            began = finished(device)
            trainer.step(batches)
            wall = finished(device) - began
        kernels = sorted(seen.key_averages(), key=lambda event: -event.self_device_time_total)
        busy = sum(event.self_device_time_total for event in kernels) / 1e6
        found |= {"idle": round(max(0.0, 1 - busy / wall), 3), "peak_gb": round(torch.cuda.max_memory_allocated() / 2**30, 2),
                  "longest": [f"{event.self_device_time_total / 1e3:.2f} ms {event.key[:50]}" for event in kernels[:6]]}
    return found


def optimizers(device: torch.device, tiny: bool) -> Found:
    """Milliseconds of an update of a large ViT's weights."""
    import timm

    found: Found = {}
    network = timm.create_model("vit_nano_patch4_32" if tiny else "vit_large_patch14_clip_224").to(device)
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    groups = [{"params": list(network.parameters()), "weight_decay": 0.05, "lr_scale": 1.0, "decays": 1.0}]
    for name in ("adamw", "lamb"):
        made = build_optimizer(groups, OptimSettings(lr=1e-4, optimizer=name))
        for _ in range(3):
            made.step()
        began = finished(device)
        for _ in range(10):
            made.step()
        found[name] = round(100 * (finished(device) - began), 3)
    return found


def copies(device: torch.device, tiny: bool) -> Found:
    """Gigabytes a second from the device to the host: tensor by tensor, and as a checkpoint is copied, through pinned memory."""
    values = [torch.zeros(2**18 if tiny else 2**24, device=device) for _ in range(16)]
    ways = {"each": lambda: [value.to("cpu", copy=True) for value in values], "pinned": lambda: to_host(values)}
    found: Found = {}
    for name, copy in ways.items():
        copy()
        began = finished(device)
        copy()
        found[name] = round(sum(value.nbytes for value in values) / 2**30 / (finished(device) - began), 2)
    return found


def _stage(device: torch.device, **run: Any) -> dict[str, Any]:
    """Returns the masked stage for this kind of device."""
    own = {"device": device.type} | ({"precision": "fp32"} if device.type == "cpu" else {})
    return MIM | {"run": RUN | own | run}


def _program(module: str, *words: str) -> None:
    line = [sys.executable, "-m", module, *words]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(line[2:])}: exit code {done.returncode}: {done.stderr[-400:]}")


def _losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


PARTS: dict[str, tuple[Callable[[torch.device, bool], Found], int]] = {
    "machine": (machine, 30), "waits": (waits, 60), "same_as_cpu": (same_as_cpu, 40), "repeat": (repeat, 90),
    "one_process": (one_process, 90), "speed": (speed, 90), "optimizers": (optimizers, 30), "copies": (copies, 20),
}
"""Part -> function, and seconds that it may take."""


def main() -> int:
    """Run the parts; returns 1 if one has failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small networks, no limits of time")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        sys.stdout.write(json.dumps(PARTS[options.part][0](torch.device(options.device), options.tiny)) + "\n")
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("error: torch sees no GPU here; --tiny --device cpu runs the same code without one\n")
        return 2
    found: Found = {}
    for name, (_, limit) in PARTS.items():
        if options.only and name not in options.only:
            continue
        line = [sys.executable, "-m", "tools.gpu_check", "--part", name, "--device", options.device]
        began = time.monotonic()
        try:
            done = subprocess.run([*line, *(["--tiny"] if options.tiny else [])], capture_output=True, text=True, check=False,
                                  timeout=None if options.tiny else limit, env=os.environ)
            found[name] = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"failed": done.stderr[-1500:]}
        except subprocess.TimeoutExpired:
            found[name] = {"failed": f"not done within {limit} s"}
        sys.stdout.write(f"{name} ({time.monotonic() - began:.0f} s): {json.dumps(found[name], indent=2)}\n")
        sys.stdout.flush()
        if options.out:
            write_json(options.out, found)
    return int(any("failed" in part for part in found.values()))


if __name__ == "__main__":
    sys.exit(main())
