"""Two ways to run a task behind one interface (`contracts.Engine`): `local` and `deepspeed`. Settings only here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from eva_mim.core.registry import ENGINES, lookup
from eva_mim.core.settings import RUNTIME, Settings
from eva_mim.optim import OptimSettings


class RunSettings(Settings):
    """Length, batch sizes, engine and device of a run."""

    epochs: int | None = Field(None, ge=1)
    samples: int | None = Field(None, ge=1)
    """Training images seen in all, in place of `epochs`; rounded to whole steps."""
    global_batch: int = Field(ge=1)
    """Images in one optimizer step, over all processes."""
    micro_batch: Annotated[int | None, RUNTIME] = Field(None, ge=1)
    """Images in one forward pass of one process; default global_batch / processes. Less of it accumulates gradients."""
    seed: int = 0
    engine: Annotated[str, RUNTIME] = "local"
    """"local" (one process) or "deepspeed" (any number)."""
    zero_stage: Annotated[Literal[0, 1, 2, 3], RUNTIME] = 0
    """DeepSpeed's sharding: 1 optimizer state, 2 and gradients, 3 and parameters."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Of the forward pass (autocast); fp16 with a dynamic loss scale. Weights, optimizer and losses are fp32."""
    device: Annotated[Literal["auto", "cpu", "cuda"], RUNTIME] = "auto"
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Keep an exponential moving average of the weights and evaluate it as well."""
    ema_warmup: bool = True
    """The average's decay rises with the step t, to 1 - (1 + t)^(-2/3) at most (timm), so that short runs have one too. False: it
    is `ema_decay` all the time, as in EVA."""
    evaluate_every: int = Field(1, ge=1)
    """Epochs between evaluations; the end is always evaluated."""
    evaluate_steps: int | None = Field(None, ge=1)
    """Steps between evaluations, in place of `evaluate_every`."""
    log_every: Annotated[int, RUNTIME] = Field(20, ge=1)
    """Steps between log lines. There the host waits for the device; DeepSpeed's ZeRO 1 to 3 also waits in each step, for the
    norm of the gradient."""
    max_skips: int = Field(20, ge=1)
    """Steps in a row without a finite gradient before the run rewinds to its last checkpoint and leaves their samples out.
    fp16 needs up to 17 to bring its loss scale from 2^16 down to 1."""
    max_rewinds: Annotated[int, RUNTIME] = Field(3, ge=0)
    """Rewinds before the run stops with a dump for `eva-mim replay`."""
    timeout_minutes: Annotated[float, RUNTIME] = Field(30.0, gt=0.0)
    """How long processes wait for a sign of each other before the run stops. One that works while others wait gives signs."""
    checkpoint_every: Annotated[int | None, RUNTIME] = Field(None, ge=1)
    """Steps between checkpoints; default one epoch."""
    keep_last: Annotated[int, RUNTIME] = Field(2, ge=1)
    """Newest checkpoints kept."""
    keep_every: Annotated[int | None, RUNTIME] = Field(None, ge=1)
    """Besides these, checkpoints whose step is a multiple of this are kept for good; null keeps none."""

    def steps(self, steps_per_epoch: int) -> int:
        """Number of steps of the run."""
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


def build_engine(student: Any, run: RunSettings, optim: OptimSettings, device: Any) -> Any:
    """The engine around a student. Raises UserError for an unknown name."""
    return lookup(ENGINES, run.engine, "run.engine")(student, run, optim, device)
