"""Linear probe: accuracy of a linear classifier on the frozen features of a stage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import model_validator

from eva_mim.data.view_settings import ViewSettings
from eva_mim.run.program import Stage, leave
from eva_mim.students import ProbeSettings
from eva_mim.tasks import MixSettings
from finetune.classify import StageRecipe as ClassifyRecipe
from finetune.classify import build_classifier

if TYPE_CHECKING:
    import torch

    from eva_mim.run.stage import Built, Networks


class StageRecipe(ClassifyRecipe):
    """Settings of a probe: a classification stage in which only the last layer is trained."""

    mix: MixSettings = MixSettings(smoothing=0.0)
    view: ViewSettings = ViewSettings(crop_scale=(0.35, 1.0))
    probe: ProbeSettings = ProbeSettings()

    @property
    def lrs(self) -> tuple[float, ...]:
        """Peak learning rate of each layer."""
        return self.probe.lrs or (self.optim.lr,)

    @model_validator(mode="after")
    def _has_features(self) -> StageRecipe:
        if self.init_from is None:
            raise ValueError("init_from must be given: a probe measures the features of a trained stage")
        return self

    @model_validator(mode="after")
    def _labels_are_plain(self) -> StageRecipe:
        if self.mix.mixup or self.mix.cutmix:
            raise ValueError("mix.mixup and mix.cutmix: a probe takes images as they are; leave them at 0")
        if self.student.head_rows != "new":
            raise ValueError(f"student.head_rows={self.student.head_rows}: the layer of a probe starts anew; leave it out")
        return self

    @model_validator(mode="after")
    def _layers_are_alone(self) -> StageRecipe:
        several = len(self.lrs) > 1
        if several and self.optim.clip_grad is not None:
            raise ValueError(f"optim.clip_grad={self.optim.clip_grad} would tie the layers of probe.lrs together; set it to null")
        if several and self.run.zero_stage == 3:
            raise ValueError("run.zero_stage=3 with several probe.lrs: a probe has no weights worth cutting up; use 0 to 2")
        if self.data.mixture and (several or self.probe.cached):
            raise ValueError("data.mixture: several probe.lrs and probe.cached need one source")
        return self

    @model_validator(mode="after")
    def _view_has_an_effect(self) -> StageRecipe:
        unset = (ViewSettings(), ViewSettings(crop_scale=(0.35, 1.0)))
        changed = [name for name, value in self.view if name != "crop_pct" and value not in [getattr(v, name) for v in unset]]
        if self.probe.cached and changed:
            raise ValueError(f"view.{changed[0]} has no effect with probe.cached=true (held-out view); leave it out")
        return self


def networks(recipe: StageRecipe, classes: int | None = None, *, weights: bool = True) -> Networks:
    """Returns a frozen trunk with linear layers of `classes` outputs; 1,000 if the number of classes is not known."""
    from eva_mim.run.stage import Networks
    from eva_mim.students.classifier import LinearProbe

    return Networks(LinearProbe(recipe.student, classes or 1000, scales=[lr / recipe.optim.lr for lr in recipe.lrs]))


def build(recipe: StageRecipe, device: torch.device) -> Built:
    """Returns networks, data and evaluator of a recipe."""
    from finetune.probe_data import probe_parts

    return build_classifier(recipe, device, networks, probe_parts)


STAGE = Stage("probe", StageRecipe, networks, build)
main = STAGE.main


if __name__ == "__main__":
    leave(main())
