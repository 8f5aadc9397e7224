"""Linear probe: how much of the labels can be read off the frozen features of a stage."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import model_validator

from eva_mim.data import ViewSettings
from eva_mim.objectives import MixSettings
from eva_mim.program import leave, run_program
from finetune.classify import StageRecipe as ClassifyRecipe
from finetune.classify import build_classifier

if TYPE_CHECKING:
    import torch

    from eva_mim.stage import Built


class StageRecipe(ClassifyRecipe):
    """Settings of a probe: a classification stage in which only the last layer learns."""

    mix: MixSettings = MixSettings(smoothing=0.0)
    view: ViewSettings = ViewSettings(crop_scale=(0.35, 1.0))

    @model_validator(mode="after")
    def _has_features(self) -> StageRecipe:
        if self.init_from is None:
            raise ValueError("init_from must be given: a probe measures the features of a trained stage")
        return self


def build(recipe: StageRecipe, device: torch.device) -> Built:
    """Frozen trunk, linear layer, data and evaluator of a recipe."""
    from eva_mim.students.classifier import LinearProbe

    return build_classifier(recipe, device, LinearProbe)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage; returns the exit code."""
    return run_program("finetune.probe", "probe", argv, "Linear probe on frozen features.")


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
