"""Settings of optimizers. `groups.py` makes parameter groups, `schedule.py` the rates of a step, `optimizers.py` optimizers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from eva_mim.core.errors import UserError
from eva_mim.core.settings import For, Settings

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class TowerSettings(Settings):
    """Rates of one tower of a CLIP student; null stands for the general value."""

    lr: Annotated[float, Field(gt=0.0)] | None = None
    """Peak learning rate; the schedule has the same form for all towers, and ends at the same share of the peak."""
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    weight_decay: Annotated[float, Field(ge=0.0)] | None = None


class HeadsSettings(Settings):
    """Rates of the heads of a masked student, and steps in which they are trained alone."""

    lr: Annotated[float, Field(gt=0.0)] | None = None
    """Peak learning rate; null for the general one. The schedule has the same form."""
    alone: int = Field(0, ge=0)
    """Number of first steps in which the heads alone are trained and everything before them stays as it is (RADIO's training
    begins each stage so)."""


class LambSettings(Settings):
    """LAMB (You et al. 2020): each tensor's Adam update is rescaled to the norm of the tensor (times the learning rate).

    Defaults are those of DeepSpeed's LAMB, which EVA-CLIP uses. One thing differs: DeepSpeed applies the bias correction to the
    whole step, so that its first steps are shorter; here it applies to the moments, as in the paper and in timm. timm's LAMB has
    no limits and does not rescale tensors without weight decay (`trust: null`, `adapt: decayed`).
    """

    trust: tuple[Annotated[float, Field(ge=0.0)], Annotated[float, Field(gt=0.0)]] | None = (0.01, 10.0)
    """Lower and upper limit of the trust ratio, norm of the tensor / norm of its update; null for none."""
    adapt: Literal["all", "decayed"] = "all"
    """Tensors whose update is rescaled by the trust ratio: all, or those with weight decay; the others take Adam's update."""


class LarsSettings(Settings):
    """LARS (You et al. 2017) in the form of MoCo v3 and MAE, as in EVA's linear probe: momentum over gradients that are rescaled
    to the tensor's norm times `trust`. Gradients of vectors and biases are not rescaled. The batch size does not scale rates."""

    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    trust: Annotated[float, Field(gt=0.0)] = 0.001
    """Norm of a matrix's rescaled gradient / norm of the matrix."""


class OptimSettings(Settings):
    """Optimizer, with warm-up and decay."""

    optimizer: Literal["adamw", "lamb", "lars"] = "adamw"
    """LAMB and LARS need the norms of unsharded tensors, and so run.zero_stage=0. (EVA-CLIP's released runs used LAMB with stage
    1, where one trust ratio applied to a rank's shard of a parameter group.) LARS is for linear probes."""
    lamb: Annotated[LambSettings, For("optimizer", "lamb")] = LambSettings()
    lars: Annotated[LarsSettings, For("optimizer", "lars")] = LarsSettings()
    lr: Annotated[float, Field(gt=0.0)]
    """Peak learning rate at this run's global batch (never rescaled)."""
    image: TowerSettings = TowerSettings()
    """The image tower of a CLIP student, with its projection into the shared space."""
    text: TowerSettings = TowerSettings()
    """The text tower, with its projection. The logit scale and bias are in neither tower and have the general values."""
    heads: HeadsSettings = HeadsSettings()
    """The heads of a masked student."""
    min_lr: Annotated[float, Field(ge=0.0)] = 0.0
    """Learning rate at the end of the schedule."""
    warmup_epochs: Annotated[float, Field(ge=0.0)] = 1.0
    """Epochs of the linear rise from 0 to `lr`."""
    warmup_steps: int | None = Field(None, ge=0)
    """Steps of the rise, in place of `warmup_epochs`."""
    warmup: Literal["linear", "inclusive"] = "linear"
    """Share of the peak at update `step` of W warm-up steps. "linear": (step + 1) / W (EVA-CLIP); "inclusive": step / (W - 1), so
    that the first update changes nothing and both step W - 1 and step W have the peak (EVA-01 and EVA-02, utils.py)."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """Decay from `lr` to `min_lr` after warm-up. A cosine reaches `min_lr` one step after the last, a line at the last step."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.05
    weight_decay_end: Annotated[float, Field(ge=0.0)] | None = None
    """Weight decay at the end of a cosine over all steps; by default the weight decay is constant."""
    betas: Annotated[tuple[Beta, Beta], For("optimizer", "adamw", "lamb")] = (0.9, 0.98)
    eps: Annotated[float, Field(gt=0.0), For("optimizer", "adamw", "lamb")] = 1e-6
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Factor on the learning rate per layer below the head: layer `id` of D + 1 layers has layer_decay^(D + 1 - id)."""
    clip_grad: Annotated[float, Field(gt=0.0)] | None = 3.0
    """Largest global gradient norm; null for no clipping."""

    @model_validator(mode="after")
    def _ends_below(self) -> OptimSettings:
        if self.min_lr > self.lr:
            raise ValueError(f"optim.min_lr={self.min_lr} is above optim.lr={self.lr}")
        if self.lamb.trust and self.lamb.trust[0] > self.lamb.trust[1]:
            raise ValueError(f"optim.lamb.trust={list(self.lamb.trust)}: the first is the lower limit")
        for tower in ("image", "text"):
            own = getattr(self, tower).weight_decay
            if own and not self.weight_decay:
                raise ValueError(f"optim.{tower}.weight_decay={own} follows the schedule of optim.weight_decay, which is 0")
        return self


def check_sharding(settings: OptimSettings, zero_stage: int) -> None:
    """Raises UserError if the optimizer needs unsharded tensors and the ZeRO stage shards them."""
    if settings.optimizer != "adamw" and zero_stage:
        raise UserError(
            f"optim.optimizer={settings.optimizer} compares the norms of whole tensors, which run.zero_stage={zero_stage} "
            "cuts up; set run.zero_stage=0 or optim.optimizer=adamw"
        )


