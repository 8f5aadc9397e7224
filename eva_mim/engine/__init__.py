"""Two engines with one interface (`contracts.Engine`): `local` and `deepspeed`. This file has the settings of a run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from eva_mim.core.registry import ENGINES, lookup
from eva_mim.core.settings import RUNTIME, For, Settings
from eva_mim.optim import OptimSettings


class RunSettings(Settings):
    """Length, batch sizes, engine and device of a run."""

    epochs: int | None = Field(None, ge=1)
    samples: int | None = Field(None, ge=1)
    """Number of training images over the run, in place of `epochs`; rounded to whole steps."""
    global_batch: int = Field(ge=1)
    """Images in one optimizer step, over all processes."""
    micro_batch: Annotated[int | None, RUNTIME] = Field(None, ge=1)
    """Images in one forward pass of one process; default global_batch / processes. A smaller value accumulates gradients."""
    seed: int = 0
    engine: Annotated[str, RUNTIME] = "local"
    """"local" (one process) or "deepspeed" (any number)."""
    zero_stage: Annotated[Literal[0, 1, 2, 3], RUNTIME] = 0
    """ZeRO stage of DeepSpeed: 1 shards optimizer state, 2 also gradients, 3 also parameters; 0 shards nothing."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Precision of the forward pass (autocast); fp16 has a dynamic loss scale. Weights, optimizer and losses are fp32."""
    tf32: bool = False
    """True: on GPUs, matrix products and convolutions of fp32 round their inputs to 10 bits (TF32), several times as fast. False:
    both are exact. Final figures always are."""
    deterministic: Annotated[bool, RUNTIME] = False
    """True: GPUs use deterministic algorithms where torch has them, so that the same run gives the same bits; slower. It warns of
    what has none. CPUs need no such setting."""
    device: Annotated[Literal["auto", "cpu", "cuda"], RUNTIME] = "auto"
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Decay of an exponential moving average of the weights, which is also evaluated; null for no average."""
    ema_warmup: Annotated[bool, For("ema_decay")] = True
    """True: the average's decay is at most 1 - (1 + t)^(-2/3) in step t (timm), so that it is of use in short runs. False: the
    decay is always `ema_decay`, as in EVA."""
    evaluate_every: int = Field(1, ge=1)
    """Epochs between evaluations; the last step is always evaluated."""
    evaluate_steps: int | None = Field(None, ge=1)
    """Steps between evaluations, in place of `evaluate_every`."""
    log_every: Annotated[int, RUNTIME] = Field(20, ge=1)
    """Steps between log lines. At a log line the host waits for the device; with ZeRO 1 to 3 DeepSpeed also waits in each step,
    for the norm of the gradient."""
    max_skips: int = Field(20, ge=1)
    """Number of consecutive steps without a finite gradient after which the run rewinds to its last checkpoint and leaves their
    samples out. fp16 needs up to 17 such steps until its loss scale has fallen from 2^16 to 1."""
    max_rewinds: Annotated[int, RUNTIME] = Field(3, ge=0)
    """Number of rewinds before the run stops with a dump for `eva-mim replay`."""
    timeout_minutes: Annotated[float, RUNTIME] = Field(30.0, gt=0.0)
    """Minutes that processes wait for each other before the run stops. A process that works while others wait sends
    heartbeats."""
    checkpoint_every: Annotated[int | None, RUNTIME] = Field(None, ge=1)
    """Steps between checkpoints; default one epoch."""
    keep_last: Annotated[int, RUNTIME] = Field(2, ge=1)
    """Number of newest checkpoints that are kept."""
    keep_every: Annotated[int | None, RUNTIME] = Field(None, ge=1)
    """Besides these, checkpoints whose step is a multiple of this number are never removed; null for none."""

    def steps(self, steps_per_epoch: int) -> int:
        """Returns the number of steps of the run."""
        return max(1, round((self.samples or 0) / self.global_batch)) if self.epochs is None else self.epochs * steps_per_epoch

    @property
    def length(self) -> str:
        """Length of the run as text: epochs or samples."""
        return f"{self.samples:,} samples" if self.epochs is None else f"{self.epochs} epochs"

    @model_validator(mode="after")
    def _ends_once(self) -> RunSettings:
        if (self.epochs is None) == (self.samples is None):
            raise ValueError("run: give run.epochs (passes over the training images) or run.samples (images seen in all)"
                             + ("" if self.epochs is None else ", not both: set the other to null"))
        return self

    @model_validator(mode="after")
    def _local_is_unsharded(self) -> RunSettings:
        if self.engine == "local" and self.zero_stage:
            raise ValueError(f"run.zero_stage={self.zero_stage} needs run.engine=deepspeed")
        if self.zero_stage == 3 and self.ema_decay is not None:
            raise ValueError("run.ema_decay needs whole weights on each process; use run.zero_stage 0 to 2")
        return self


def build_engine(student: Any, run: RunSettings, optim: OptimSettings, device: Any, micro_batches: int | None = None) -> Any:
    """Returns the engine of the settings, with the student in it. `micro_batches`: those of a process in a step; default as the
    settings of the run have it. Raises UserError for an unknown name."""
    return lookup(ENGINES, run.engine, "run.engine")(student, run, optim, device, micro_batches)
