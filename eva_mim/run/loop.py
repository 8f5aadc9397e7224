"""The training loop of all stages: steps, log lines, evaluations, checkpoints, rewinds, and a clean stop on a signal."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from eva_mim.core.batches import Batch
from eva_mim.core.contracts import Engine, Evaluator, StateGroup, Task, TrainData
from eva_mim.core.devices import set_arithmetic
from eva_mim.core.distributed import all_reduce_sum, barrier, detect_lost_processes, is_main, rank, run_on_main, world_size
from eva_mim.core.errors import Diverged, Interrupted, UserError
from eva_mim.core.log import RunLog, duration, say
from eva_mim.core.rng import derive, seed_all
from eva_mim.core.run_folder import RunFolder
from eva_mim.core.timing import Stopwatch, measuring, phase
from eva_mim.data import too_many
from eva_mim.engine import RunSettings
from eva_mim.engine.step import autocast
from eva_mim.optim import OptimSettings
from eva_mim.optim.schedule import rates_at
from eva_mim.run import checkpoints as snapshot
from eva_mim.run.console import StepBar, step_line, wrapped
from eva_mim.run.dump import write_dump
from eva_mim.run.measure import EMA, EXACT, average_of, measure
from eva_mim.run.meter import Meter, Row
from eva_mim.run.signals import PATIENCE, Agreement, Hung, caught_signals, interruptible
from eva_mim.run.stability import SkipCounter, SkippedData, SpikeAlarm

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass
class Parts:
    """Task, training data and evaluator of a stage, for the loop."""

    task: Task
    train: TrainData
    evaluator: Evaluator
    max_broken: float
    report: Callable[[Path, Callable[[Image], None]], None] | None = None
    """(run folder, function that adds a picture to TensorBoard): writes tables and pictures of the last evaluation. The main
    rank calls it after each one; None: there are none."""


class RunState(NamedTuple):
    """State of a run in a checkpoint besides its tensors, in JSON's types."""

    window: list[Row]
    """Figures of each step since the last log line, means over ranks."""
    broken: int
    """Number of records that could not be read so far, over all ranks."""
    skipped: int
    """Number of steps skipped so far."""
    alarm: list[float]
    """`SpikeAlarm.state`."""
    evaluation_due: bool
    """True if an evaluation is due between this step and the next."""


@dataclass
class Trained:
    """Result of the loop."""

    engine: Engine
    ema: Any
    metrics: dict[str, float]
    seconds: float


class Loop:
    """One run of a stage from its last checkpoint (or the start) to its end."""

    def __init__(self, parts: Parts, engine: Engine, run: RunSettings, optim: OptimSettings, out: Path, device: torch.device):
        self.parts, self.engine, self.run, self.optim, self.out, self.device = parts, engine, run, optim, out, device
        self.steps_per_epoch = parts.train.steps_per_epoch
        self.total = run.steps(self.steps_per_epoch)
        self.ema = average_of(engine.module, run)
        self.detours = SkippedData(out, is_main())
        self.norm_statistics = [buffer for name, buffer in engine.module.named_buffers()
                                if name.endswith(("running_mean", "running_var"))]
        self.alarm, self.stopwatch = SpikeAlarm(), Stopwatch(device.type == "cuda")
        self.broken = self.skipped = 0
        self.window: list[Row] = []
        self.evaluation_due = False
        self.writer = snapshot.Writer(out, keep_last=run.keep_last, keep_every=run.keep_every)
        self.agreement = Agreement(device)
        self.step = self._resume()
        self.metrics: dict[str, float] = {}
        self.checkpoint_due = False

    def __call__(self) -> Trained:
        """Trains to the last step. Raises Interrupted after a signal, UserError for too many broken images, Diverged,
        LostProcess."""
        self.started, self.first = time.perf_counter(), self.step
        say(f"  {self.total} steps of {self.run.global_batch} images, {self.steps_per_epoch} an epoch"
            + (f"; going on from step {self.first}" if self.first else ""))
        self.log = RunLog(self.out, self.step)
        self.log.write("start", self.step, self.step * self.run.global_batch, {})
        self.meter = Meter(self.stopwatch)
        self.engine.module.train()
        self.bar = StepBar(self.total, self.first)
        with (detect_lost_processes(self._place), closing(self.writer), caught_signals() as caught, measuring(self.stopwatch),
              self.bar):
            if self.evaluation_due:
                self._evaluate()
            while self.step < self.total:
                self._train(caught)
            self.writer.finish()
            if not self.metrics or self.run.precision != EXACT or self.run.tf32:  # without figures: resumed after the last step
                set_arithmetic(deterministic=self.run.deterministic)
                self._evaluate(EXACT)
        self.log.close()
        return Trained(self.engine, self.ema, self.metrics, time.perf_counter() - self.started)

    def _train(self, caught: list[int]) -> None:
        """Trains until the last step, or until a rewind to an earlier checkpoint. Raises Interrupted after a signal."""
        streak = SkipCounter()
        try:
            self._steps(caught, streak)
        except Hung as hung:
            self._leave_waiting(streak)
            raise Interrupted(hung.number) from None

    def _leave_waiting(self, streak: SkipCounter) -> None:
        """Writes a checkpoint, unless there is one of this step, after a signal came while no batch did. In a run of several
        processes the others may be in a step, so none can be gathered: the last one stands."""
        self.writer.finish()
        found = RunFolder(self.out).latest()
        if self.step > self.first and (found is None or found[0] < self.step) and world_size() == 1:
            self._save(streak)
            self.writer.finish()
        elif world_size() > 1:
            say(f"  no batch came within {PATIENCE:.0f} s of the signal: ending without another checkpoint")
        self.log.close()

    def _steps(self, caught: list[int], streak: SkipCounter) -> None:
        recent = deque[tuple[int, int]](maxlen=self.run.max_skips)
        self.meter = Meter(self.stopwatch, self.window)
        for data_step, batches in self._loaded():
            streak.note(self._one_step(batches))
            self.bar.advance(self.step)
            recent.append((self.step - 1, data_step))
            if streak.length or self.run.max_skips == 1:
                streak.settle()  # while steps are skipped, wait for each one, so that the counter is current
            if streak.length >= self.run.max_skips:
                return self._rewind(list(recent), batches)
            due = self.step % self.run.log_every == 0 or self.step == self.total
            if due:
                self._write()
            stop = self._stop_asked(caught) if due or self.agreement.is_due(self.step) else 0
            self.evaluation_due = self._is_due(self.run.evaluate_steps or self.run.evaluate_every * self.steps_per_epoch)
            if stop:
                self._save(streak)
                self.writer.finish()
                self.log.close()
                raise Interrupted(stop)
            if self.evaluation_due:
                self._evaluate()
            if self._is_due(self.run.checkpoint_every or self.steps_per_epoch) or self.checkpoint_due:
                self._save(streak)
        streak.settle()
        if streak.length:
            say(f"  the last {streak.length} steps had no finite gradient and changed nothing")

    def _place(self) -> str:
        found = RunFolder(self.out).latest()
        saved = f"the checkpoint of step {found[0]}" if found else "no checkpoint"
        return f" in step {self.step}, with {saved} and run.timeout_minutes={self.run.timeout_minutes:g}"

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.total

    def _loaded(self) -> Iterator[tuple[int, list[Batch]]]:
        stream = self.detours.stream(self.parts.train, self.step, self.total)
        while True:
            with phase("data"), interruptible():
                item = next(stream, None)
            if item is None:
                return
            yield item[0], [batch.to(self.device) for batch in item[1]]

    def _one_step(self, batches: list[Batch]) -> torch.Tensor:
        # The random numbers that networks and mixup draw in this step are a function of (seed, step, rank).
        seed_all(derive(self.run.seed, "step", self.step, rank()))
        self.rates = rates_at(self.step, self.optim, steps_per_epoch=self.steps_per_epoch,
                              epochs=self.total / self.steps_per_epoch)
        self.step += 1
        before = [buffer.clone() for buffer in self.norm_statistics]
        output = self.engine.step(self.parts.task, batches, self.rates, measure_update=self._is_due(self.run.log_every))
        for buffer, old in zip(self.norm_statistics, before, strict=True):  # updated in skipped steps, too
            buffer.copy_(torch.where(output.metrics["skipped"] > 0, old, buffer))
        self.meter.outputs.append(output)
        self.meter.images += sum(len(batch.index) for batch in batches) * world_size()
        self.meter.broken += [fault for batch in batches for fault in batch.broken]
        if self.ema is not None:
            self.ema.update(self.engine.module, self.step)
        return output.metrics["skipped"]

    def _write(self) -> None:
        window, faults = self.meter.read(self.device), self.meter.broken
        self.meter = Meter(self.stopwatch)
        for fault in faults[:20]:
            say(f"  broken image replaced: {fault}")
        for spike in self.alarm.feed(window.losses):
            say(f"  loss spike: {spike:.4f} against a running mean of {self.alarm.mean:.4f}, before step {self.step}")
        self.broken += round(window.figures["broken"])
        self.skipped += round(window.figures["skipped"])
        samples = self.step * self.run.global_batch
        values = window.figures | {
            "lr": self.rates.lr,
            "weight_decay": self.rates.weight_decay,
            "epoch": self.step / self.steps_per_epoch,
            "images_per_s": window.images_per_s,
            "broken": float(self.broken),
            "skipped": float(self.skipped),
            "spikes": float(self.alarm.spikes),
        }
        self.log.write("train", self.step, samples, values | {f"time_{name}": share for name, share in window.shares.items()})
        left = (time.perf_counter() - self.started) / max(1, self.step - self.first) * (self.total - self.step)
        say(step_line(self.step, self.total, values, window.shares, left))
        self.bar.told(values)
        if too_many(self.broken, samples, self.parts.max_broken):
            raise UserError(
                f"{self.broken} of {samples} images are broken, more than data.max_broken={self.parts.max_broken:.2%}; "
                f"the last: {(faults or ['on another rank'])[-1]}"
            )

    def _stop_asked(self, caught: list[int]) -> int:
        """Returns the signal that any rank has caught, or 0. Raises UserError if the main rank could not write its checkpoint."""
        stop, failed = self.agreement(self.step, caught[0] if caught else 0, self.writer.failed())
        if failed:
            self.writer.finish()
        return stop

    def _rewind(self, bad: list[tuple[int, int]], batches: list[Batch]) -> None:
        """Rewinds to the last checkpoint and leaves out the data steps of the `bad` (step, data step)s. Raises Diverged, after a
        dump of the last step, if no checkpoint or no rewind is left."""
        first, last = bad[0][1], bad[-1][1]
        self.writer.finish()
        found = snapshot.newest(self.out)
        if found is None or self.detours.rewinds >= self.run.max_rewinds:
            why = "and there is no checkpoint to rewind to" if found is None else (
                f"after {self.detours.rewinds} rewinds (a larger run.max_rewinds goes on around them)")
            folder = write_dump(self.out, self.engine, self.parts, self.run, bad, batches)
            self.log.close()
            raise Diverged(f"{len(bad)} steps in a row have no finite gradient, {why}; "
                           f"look at the last of them with: eva-mim replay {folder}")
        self.detours.add(first, last)
        say(f"  {len(bad)} steps in a row have no finite gradient: back to step {found[0]}, and data steps {first} to {last} "
            f"are left out (rewind {self.detours.rewinds} of at most {self.run.max_rewinds})")
        barrier()
        self.log.close()
        self._restore(*found)
        self.log = RunLog(self.out, self.step)
        figures = {"rewinds": float(self.detours.rewinds), "first_left_out": float(first), "last_left_out": float(last)}
        self.log.write("rewind", self.step, self.step * self.run.global_batch, figures)

    def _evaluate(self, precision: str | None = None) -> None:
        """Measures the student; without `precision` in that of the run."""
        began, final = time.perf_counter(), precision is not None and (precision != self.run.precision or self.run.tf32)
        precision = precision or self.run.precision
        self._average_norm_statistics()
        with self.engine.full_module() as module:
            self.metrics = measure(self.parts.evaluator, module, self.ema, partial(autocast, self.device, precision))
        self.log.write("final" if final else "eval", self.step, self.step * self.run.global_batch, self.metrics)
        if self.parts.report is not None:
            run_on_main(partial(self.parts.report, self.out, partial(self.log.draw, "held_out", self.step)))
        took = time.perf_counter() - began
        say(wrapped(f"held out, epoch {self.step / self.steps_per_epoch:g}, {precision}:", self.metrics, f"({duration(took)})"))
        self.meter.started += took
        self.evaluation_due = False

    def _average_norm_statistics(self) -> None:
        # Batch norms of each rank have the statistics of its own images; evaluation and checkpoints need one value.
        for buffer in self.norm_statistics if world_size() > 1 else ():
            buffer.copy_(all_reduce_sum(buffer.clone()) / world_size())

    def _save(self, streak: SkipCounter) -> None:
        # A run may rewind to a checkpoint, so none is written while steps are skipped (the weights do not change), except at
        # the last step.
        self.checkpoint_due = self.step < self.total and not streak.clean()
        if self.checkpoint_due:
            return
        with phase("checkpoint"):
            self._average_norm_statistics()
            self.log.flush()
            broken = self.broken + self.meter.broken_everywhere(self.device)
            kept = RunState(self.meter.rows(self.device), broken, self.skipped, self.alarm.state(), self.evaluation_due)
            self.writer.save(self.step, self._parts(), kept._asdict())

    def _parts(self) -> dict[str, StateGroup]:
        average = {} if self.ema is None else {EMA: snapshot.kept_here(self.ema.module.state_dict())}
        return self.engine.state() | self.parts.task.state() | average

    def _resume(self) -> int:
        found = snapshot.newest(self.out)
        if found is None:
            self.detours.forget()
            return 0
        self.detours.load()
        return self._restore(*found)

    def _restore(self, step: int, folder: Path) -> int:
        kept = RunState(**snapshot.load(folder, self._parts()))
        self.window, self.broken, self.skipped, self.evaluation_due = kept.window, kept.broken, kept.skipped, kept.evaluation_due
        self.alarm.restore(kept.alarm)
        self.step = step
        self.agreement.restart(step)
        return step
