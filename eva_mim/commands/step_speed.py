"""`eva-mim bench step`: where the time of a training step goes, and which setting would change it."""

from __future__ import annotations

import os
import resource
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from eva_mim.commands import program_of
from eva_mim.core.batches import Batch, MaskedBatch
from eva_mim.core.distributed import is_main, rank, world_size
from eva_mim.core.files import write_text
from eva_mim.core.recipe_files import read_yaml
from eva_mim.core.registry import PROGRAMS, lookup
from eva_mim.core.resolve import resolve
from eva_mim.core.timing import Stopwatch, measuring, phase
from eva_mim.engine import build_engine
from eva_mim.engine.step import slowdown
from eva_mim.optim.schedule import rates_at
from eva_mim.run.meter import Meter
from eva_mim.run.recipe import Recipe
from eva_mim.run.stage import Built, prepare

WARM_UP = 2
"""Steps before the measured ones, in which caches fill and memory is taken."""
PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::convolution", "aten::convolution_backward"}
"""Operators that do nearly all operations of a network but for its attention."""
REPEATS = 3
"""Times that each product is computed alone; the fastest counts."""
WAITS, TEACHES, TALKS, FAST = 0.15, 0.4, 0.4, 0.7
"""Shares from which a step is called bound by its data, its teachers, its collectives, and this machine's matrix rate."""
BF16 = 0.7
"""Time of a product in bf16 by that in fp32, below which bf16 is proposed."""


class Shape(NamedTuple):
    """A tensor without its values."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def made(self, device: torch.device) -> Tensor:
        """Returns a tensor of this shape."""
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=device).fill_(0.5)


class Products(TorchDispatchMode):
    """Collects the products of a step, by operator and arguments."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[tuple[Any, tuple[Any, ...]]] = Counter()
        self.operations = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        if function._schema.name in PRODUCTS and not keywords:
            self.found[function, _frozen(arguments)] += 1
            self.operations += flop_registry[function._overloadpacket](*arguments, out_val=result)
        return result

    def seconds_alone(self, device: torch.device) -> float:
        """Returns the seconds that these products take with nothing between them."""
        total = 0.0
        for (function, arguments), count in self.found.items():
            given = [one.made(device) if isinstance(one, Shape) else one for one in arguments]
            total += count * _fastest(partial(function, *given), device)
        return total


class StepSpeed(BaseModel, extra="forbid", frozen=True):
    """Figures of a training step on one machine."""

    recipe: str
    program: str
    overrides: list[str]
    device: str
    processes: int
    threads: int
    """Of each process."""
    precision: str
    slowdown: float
    """Time of a matrix product in this precision / its time in fp32; above 2 where the processor emulates it."""
    bf16: float = 1.0
    """Time of a matrix product in bf16 / its time in fp32, of a step in fp32; else 1."""
    workers: int
    """Loader processes of each process."""
    batch: int
    """Images of a step, over all processes."""
    micro_batch: int
    steps: int
    """Steps that were measured."""
    seconds: float
    """Of a step."""
    phases: dict[str, float]
    """Seconds of a step by phase, of the main process; "rest" is what no phase covers."""
    logging: float
    """Seconds of reading the figures for a log line, divided among the steps between two lines; beside the step."""
    communication: float = 0.0
    """Seconds that the collectives of a step take, of the main process, with its waiting for the others; the backward pass may go
    on meanwhile."""
    peak_memory: int
    """Bytes: of tensors on a GPU, of the process on a CPU, the main process's."""
    gflop: float
    """Operations of a step in matrix products and convolutions of one process, in 1e9; attention is not counted."""
    products: float
    """Seconds that these take with nothing between them, in the same shapes and types."""
    forward: dict[str, float]
    """Images a second of forward passes without gradients: of the student's features, and of each teacher."""

    @property
    def images_per_s(self) -> float:
        """Over all processes."""
        return self.batch / self.seconds

    @property
    def rate(self) -> float:
        """GFLOP/s of the products alone."""
        return self.gflop / self.products if self.products else 0.0

    def share(self, start: str) -> float:
        """Returns the share of the step in phases whose names begin so."""
        return sum(spent for name, spent in self.phases.items() if name.startswith(start)) / self.seconds

    @property
    def verdict(self) -> str:
        """One sentence: what bounds the step, and the setting that moves it."""
        if self.slowdown > 2:
            return (f"run.precision={self.precision} is emulated here, {self.slowdown:.0f} times as slow as fp32: set "
                    "run.precision=fp32.")
        if (waits := self.share("data")) > WAITS:
            return (f"{waits:.0%} of the step waits for data: more loader processes than data.workers={self.workers} help while "
                    "processors are free, then smaller images (eva-mim bench data says where their time goes).")
        if (teaching := self.share("teacher")) > TEACHES:
            return (f"{teaching:.0%} of the step is the teacher's forward pass: a cache of its features takes it away (eva-mim "
                    "cache, targets.cached); a smaller teacher or teacher.image_size makes it shorter.")
        if (talking := self.communication / self.seconds) > TALKS:
            return (f"its collectives take as long as {talking:.0%} of the step: a larger share of a step is computed if each "
                    f"process has more images (run.global_batch={self.batch} over {self.processes} processes), a lower "
                    "run.zero_stage sends less, and processes on one host are nearest to each other.")
        share = self.products / self.seconds
        if self.bf16 < BF16:
            return (f"{share:.0%} of the step are matrix products in fp32, and in bf16 they are {1 / self.bf16:.1f} times as "
                    "fast here: set run.precision=bf16.")
        if share > FAST:
            ways = "a smaller student, or student.form=visible" if self.program == "mim" else "a smaller student or image"
            return (f"{share:.0%} of the step are matrix products at this machine's own rate for them ({self.rate:.0f} GFLOP/s): "
                    f"only fewer operations make it faster ({ways}).")
        return (f"{share:.0%} of the step are matrix products; the rest is work between them, which weighs less in larger "
                f"micro-batches (run.micro_batch={self.micro_batch}) and wider students.")

    def report(self) -> str:
        """Returns the figures as text of 80 columns."""
        lines = [f"{self.images_per_s:.4g} images/s: {self.seconds:.3g} s a step of {self.batch} images",
                 f"{self.device} x {self.processes}, {self.precision}; peak memory {self.peak_memory / 1e9:.3g} GB", ""]
        for name, spent in sorted(self.phases.items(), key=lambda item: -item[1]):
            lines.append(f"  {name:<20} {1000 * spent:>9.1f} ms {spent / self.seconds:>6.1%}")
        lines.append(f"  {'log lines, beside it':<20} {1000 * self.logging:>9.1f} ms {self.logging / self.seconds:>6.1%}")
        if self.processes > 1:
            share = self.communication / self.seconds
            lines.append(f"  {'collectives, beside it':<22} {1000 * self.communication:>7.1f} ms {share:>6.1%}")
        each, share = self.gflop * self.processes / self.batch, self.products / self.seconds
        lines += ["", f"matrix products: {each:.3g} GFLOP an image; alone, at {self.rate:.0f} GFLOP/s, {share:.0%} of the step"]
        lines += [f"forward pass of {name}: {rate:.4g} images/s" for name, rate in self.forward.items()]
        return "\n".join([*lines, "", *textwrap.wrap(self.verdict, 80), ""])


def measure_step(program: str | None, path: str, overrides: Sequence[str], steps: int, to: Path | None) -> None:
    """Trains a few steps of a recipe and prints where their time goes. Raises UserError for a recipe that cannot run."""
    program = program_of(path, program)
    stage = lookup(PROGRAMS, program, "--program")
    recipe: Recipe = resolve(stage.recipe, read_yaml(path), overrides, path)
    device, built = prepare(recipe, stage.build)
    names = {"recipe": path, "program": program, "overrides": list(overrides)}
    found = StepSpeed.model_validate(names | _measured(recipe, built, device, steps))
    if is_main():
        sys.stdout.write(found.report())
        if to is not None:
            write_text(to, found.model_dump_json(indent=1) + "\n")


def _measured(recipe: Recipe, built: Built, device: torch.device, steps: int) -> dict[str, Any]:
    engine = build_engine(built.parts.task.student, recipe.run, recipe.optim, device, built.parts.train.micro_batches)
    engine.module.train()
    data = iter(built.parts.train.steps(0, WARM_UP + steps + 1))
    rates = rates_at(0, recipe.optim, steps_per_epoch=built.parts.train.steps_per_epoch, epochs=1.0)
    products, stopwatch, meter = Products(), Stopwatch(device.type == "cuda"), Meter(Stopwatch())

    def step() -> Batch:
        with phase("data"), measuring(Stopwatch()):  # without loader processes, phases of the loader are within this one
            batches: list[Batch] = [batch.to(device) for batch in next(data)]
        meter.outputs.append(engine.step(built.parts.task, batches, rates))
        return batches[0]

    for number in range(WARM_UP):
        with products if number == WARM_UP - 1 else nullcontext():
            batch = step()
    meter.outputs.clear()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with measuring(stopwatch):
        seconds = _seconds(lambda: [step() for _ in range(steps)], device) / steps
    phases = {name: spent / steps for name, spent in stopwatch.take().items()}
    peak = _peak_memory(device)
    logging = _seconds(lambda: meter.read(device), device) / recipe.run.log_every
    communication = _collectives(step) if world_size() > 1 else 0.0
    piece = recipe.pieces(rank(), world_size())[0]
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processes": world_size(), "threads": torch.get_num_threads(), "workers": recipe.data.workers,
        "precision": recipe.run.precision, "slowdown": slowdown(recipe.run.precision, device),
        "bf16": slowdown("bf16", device) if recipe.run.precision == "fp32" else 1.0,
        "batch": recipe.run.global_batch, "micro_batch": piece.last - piece.first, "steps": steps, "seconds": seconds,
        "phases": phases | {"rest": max(0.0, seconds - sum(phases.values()))}, "logging": logging,
        "communication": communication, "peak_memory": peak,
        "gflop": products.operations / 1e9, "products": products.seconds_alone(device),
        "forward": _forward(built, engine, batch, device),
    }


def _collectives(step: Callable[[], Any]) -> float:
    """Returns the seconds that the collectives of a step take, by torch's profiler. Every rank must call."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler tells when it starts and stops
    cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
        step()
        if cuda:
            torch.cuda.synchronize()
    # Gloo's threads name what they do; of NCCL it is the kernels that count, not their launches.
    spent = [event.time_range.elapsed_us() for event in found.events() or ()
             if event.name.startswith("gloo:") or (event.device_type.name == "CUDA" and event.name.startswith("nccl"))]
    return float(sum(spent)) / 1e6


def _forward(built: Built, engine: Any, batch: Any, device: torch.device) -> dict[str, float]:
    """Returns images a second of forward passes of the student's features and of each teacher of the batch, on what each sees of
    it."""
    task: Any = built.parts.task
    student, masked = task.student, isinstance(batch, MaskedBatch)
    networks = dict[str, Callable[[], Any]]()
    images = task.images(batch) if masked else getattr(batch, "images", None)
    if images is not None:
        names = [name for name in ("features", "encode_image", "forward") if hasattr(student, name)]
        networks["the student"] = partial(getattr(student, names[0]), images)
    for name in task.taught(batch) if masked and not batch.stored else ():
        called = f"teacher {name}" if len(built.teachers) > 1 else "the teacher"
        networks[called] = partial(task.targets, batch, [name])
    with torch.no_grad(), engine.autocast():
        return {name: batch.size / _fastest(forward, device) for name, forward in networks.items()}


def compare(first: StepSpeed, second: StepSpeed) -> str:
    """Returns two measurements side by side: milliseconds an image by phase, and how much faster the second is."""
    rows = [("images/s", first.images_per_s, second.images_per_s, second.images_per_s / first.images_per_s)]
    for name in dict.fromkeys([*first.phases, *second.phases]):
        before, after = (1000 * one.phases.get(name, 0.0) / one.batch for one in (first, second))
        rows.append((f"{name}, ms an image", before, after, before / after if after else float("inf")))
    lines = [f"{'':<26} {'first':>10} {'second':>10} {'faster':>8}"]
    for name, before, after, ratio in rows:
        lines.append(f"{name:<26} {before:>10.4g} {after:>10.4g} {'gone' if ratio == float('inf') else f'{ratio:.2f}x':>8}")
    told = ("recipe", "overrides", "device", "processes", "threads", "precision", "workers", "batch", "micro_batch")
    lines += [f"{name}: {one} -> {other}" for name in told for one, other in [(getattr(first, name), getattr(second, name))]
              if one != other]
    return "\n".join([*lines, ""])


def _peak_memory(device: torch.device) -> int:
    """Returns the largest memory of tensors on a GPU, or of the process on a CPU, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _fastest(work: Callable[[], Any], device: torch.device) -> float:
    """Returns the seconds of the fastest of a few calls."""
    return min(_seconds(work, device) for _ in range(REPEATS))


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Returns the seconds that a function takes, until the device has done what it asks for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _frozen(value: Any) -> Any:
    """Returns arguments with their tensors as shapes, as a key."""
    if isinstance(value, Tensor):
        return Shape(tuple(value.shape), tuple(value.stride()), value.dtype)
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value
