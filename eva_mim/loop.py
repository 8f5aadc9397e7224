"""The one training loop: steps, log lines, evaluations, checkpoints, and a clean stop on a signal."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eva_mim import checkpoint
from eva_mim.config import UserError
from eva_mim.contracts import Engine, Evaluator, StepOutput, Task, TrainData
from eva_mim.distributed import all_reduce_sum, is_main, rank, world_size
from eva_mim.engine import RunSettings
from eva_mim.log import RunLog, duration, say
from eva_mim.optim import OptimSettings, lr_at
from eva_mim.rng import derive, seed_all

EMA = "ema.pt"
MIN_BROKEN = 10
"""Fewer broken images than this never stop a run, whatever their share."""


class Interrupted(Exception):
    """A signal ended the run after a checkpoint. `number` is the signal's."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


@dataclass
class Parts:
    """What a stage program builds and the loop runs."""

    task: Task
    train: TrainData
    evaluator: Evaluator
    max_broken: float


@dataclass
class Trained:
    """What the loop hands back."""

    engine: Engine
    ema: Any
    metrics: dict[str, float]
    seconds: float


class Meter:
    """Sums between two log lines. Tensors stay on the device until the line is due."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.waited = 0.0
        self.images = 0
        self.outputs: list[StepOutput] = []
        self.broken: list[str] = []

    def means(self, device: torch.device) -> tuple[dict[str, float], int]:
        """(means over steps and ranks, number of broken images over ranks)."""
        names = sorted(self.outputs[0].metrics)
        columns = [torch.stack([output.loss for output in self.outputs]).mean()]
        columns += [torch.stack([output.metrics[name].float() for output in self.outputs]).mean() for name in names]
        row = torch.stack([*columns, columns[0].new_tensor(float(len(self.broken)))]).to(device, torch.float64)
        values = all_reduce_sum(row).tolist()
        means = {name: value / world_size() for name, value in zip(["loss", *names], values, strict=False)}
        return means, round(values[-1])


class Loop:
    """One run of a stage from its last checkpoint (or the start) to its end."""

    def __init__(self, parts: Parts, engine: Engine, run: RunSettings, optim: OptimSettings, out: Path, device: torch.device):
        self.parts, self.engine, self.run, self.optim, self.out, self.device = parts, engine, run, optim, out, device
        self.steps_per_epoch = parts.train.steps_per_epoch
        self.total = run.epochs * self.steps_per_epoch
        self.ema = self._make_ema()
        self.step = self._resume()
        self.log = RunLog(out, self.step)
        self.log.write("start", self.step, self.step * run.global_batch, {})
        self.broken = 0
        self.metrics: dict[str, float] = {}

    def __call__(self) -> Trained:
        """Train to the end. Raises Interrupted after a signal, UserError for too many broken images."""
        started, first = time.perf_counter(), self.step
        every = self.run.checkpoint_every or self.steps_per_epoch
        say(f"  {self.total} steps of {self.run.global_batch} images, {self.steps_per_epoch} an epoch"
            + (f"; going on from step {first}" if first else ""))
        self.engine.module.train()
        with caught_signals() as caught:
            meter = Meter()
            for batches in self._loaded(meter, first):
                self._one_step(batches, meter)
                due = self.step % self.run.log_every == 0 or self.step == self.total
                stop = caught[0] if caught and world_size() == 1 else 0
                if due or stop:
                    self._write(meter, started, first)
                    stop = self._agree(caught) if world_size() > 1 else stop
                    meter = self._fresh(meter)
                if stop:
                    self._save()
                    self.log.close()
                    raise Interrupted(stop)
                if self.step % (self.steps_per_epoch * self.run.evaluate_every) == 0 or self.step == self.total:
                    self._evaluate()
                if self.step % every == 0 or self.step == self.total:
                    self._save()
        if not self.metrics:  # resumed after the last step: the figures were not kept in memory
            self._evaluate()
        self.log.close()
        return Trained(self.engine, self.ema, self.metrics, time.perf_counter() - started)

    def _loaded(self, meter: Meter, first: int) -> Iterator[Any]:
        self._meter = meter
        waiting = time.perf_counter()
        for batches in self.parts.train.steps(first, self.total):
            self._meter.waited += time.perf_counter() - waiting
            yield [batch.to(self.device) for batch in batches]
            waiting = time.perf_counter()

    def _fresh(self, old: Meter) -> Meter:
        self._meter = Meter()
        return self._meter

    def _one_step(self, batches: list[Any], meter: Meter) -> None:
        # Whatever a network or an augmentation draws in this step is a function of (seed, step, rank).
        seed_all(derive(self.run.seed, "step", self.step, rank()))
        lr = lr_at(self.step, self.optim, steps_per_epoch=self.steps_per_epoch, epochs=self.run.epochs)
        meter.outputs.append(self.engine.step(self.parts.task, batches, lr))
        meter.images += sum(len(batch.index) for batch in batches) * world_size()
        meter.broken += [fault for batch in batches for fault in batch.broken]
        self.lr = lr
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.engine.module, self.step)

    def _write(self, meter: Meter, started: float, first: int) -> None:
        means, broken = meter.means(self.device)
        for fault in meter.broken[:20]:
            say(f"  broken image replaced: {fault}")
        self.broken += broken
        elapsed = time.perf_counter() - meter.started
        left = (time.perf_counter() - started) / (self.step - first) * (self.total - self.step)
        samples = self.step * self.run.global_batch
        values = means | {
            "lr": self.lr,
            "epoch": self.step / self.steps_per_epoch,
            "images_per_s": meter.images / elapsed,
            "data_wait": meter.waited / elapsed,
            "broken": float(self.broken),
        }
        self.log.write("train", self.step, samples, values)
        say(f"  step {self.step:>6}/{self.total}  epoch {values['epoch']:6.2f}  loss {means['loss']:8.4f}  "
            f"lr {self.lr:.2e}  |g| {means['grad_norm']:7.3f}  {values['images_per_s']:7.1f} images/s  "
            f"data wait {values['data_wait']:4.0%}  left {duration(left)}")
        seen = samples - first * self.run.global_batch
        if self.broken > max(MIN_BROKEN, self.parts.max_broken * seen):
            raise UserError(
                f"{self.broken} of {seen} images are broken, more than data.max_broken={self.parts.max_broken:.2%}; "
                f"the last: {(meter.broken or ['on another rank'])[-1]}"
            )

    def _agree(self, caught: list[int]) -> int:
        flag = torch.tensor(caught[0] if caught else 0, device=self.device)
        if world_size() > 1:
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return int(flag)

    @torch.no_grad()
    def _evaluate(self) -> None:
        began = time.perf_counter()
        self._average_norm_statistics()
        with self.engine.whole() as module:
            self.metrics = self._measure(module, "")
        if self.ema is not None:
            self.metrics |= self._measure(self.ema.module, "ema_")
        self.log.write("eval", self.step, self.step * self.run.global_batch, self.metrics)
        text = "  ".join(f"{name} {value:.4g}" for name, value in self.metrics.items())
        say(f"  held out, epoch {self.step / self.steps_per_epoch:g}: {text}  ({duration(time.perf_counter() - began)})")
        self._meter.started += time.perf_counter() - began

    def _measure(self, module: Any, prefix: str) -> dict[str, float]:
        module.eval()
        values = self.parts.evaluator(module, self.engine.autocast)
        module.train()
        return {prefix + name: value for name, value in values.items()}

    def _average_norm_statistics(self) -> None:
        # Each rank's batch norms have seen other images; evaluation and checkpoints need one answer.
        for name, buffer in self.engine.module.named_buffers():
            if name.endswith(("running_mean", "running_var")) and world_size() > 1:
                buffer.copy_(all_reduce_sum(buffer.clone()) / world_size())

    def _make_ema(self) -> Any:
        if self.run.ema_decay is None:
            return None
        from timm.utils import ModelEmaV3

        return ModelEmaV3(self.engine.module, decay=self.run.ema_decay, use_warmup=True)

    def _save(self) -> None:
        self._average_norm_statistics()

        def extra(folder: Path) -> None:
            if self.ema is not None:
                torch.save(self.ema.module.state_dict(), folder / EMA)

        checkpoint.save(self.out, self.step, self.engine, extra, self.run.keep_last)

    def _resume(self) -> int:
        found = checkpoint.latest(self.out)
        if found is None:
            return 0
        step, folder = found
        self.engine.load(folder)
        if self.ema is not None:
            self.ema.module.load_state_dict(torch.load(folder / EMA, map_location=self.device, weights_only=True))
        return step


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collects SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 instead of dying; a second Ctrl-C is Python's again."""
    caught: list[int] = []

    def note(number: int, frame: Any) -> None:
        caught.append(number)
        if is_main():
            say(f"  {signal.Signals(number).name}: ending this step, then writing a checkpoint")
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    try:
        before = {number: signal.signal(number, note) for number in numbers}
    except ValueError:  # not in the main thread
        yield caught
        return
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

