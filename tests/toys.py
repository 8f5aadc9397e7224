"""A toy of each kind of part: what a newcomer writes for a teacher, a head, an objective, a task with its program, a command
and a format. `tests/core/test_toys.py` names each in its table, in one line, and runs them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eva_mim.convert.verify import reopened
from eva_mim.convert.writers import Model
from eva_mim.core.batches import LabelledBatch
from eva_mim.core.contracts import Features, Grid, Task
from eva_mim.core.files import sha256
from eva_mim.core.losses import LossTerm, StepOutput
from eva_mim.core.report import KeyReport
from eva_mim.data.preparation import LabelledPreparation
from eva_mim.data.splits import open_splits
from eva_mim.data.view_settings import ViewSettings
from eva_mim.data.views import EvalView, TrainView
from eva_mim.run.loaders import eval_loader, train_loader
from eva_mim.run.loop import Parts
from eva_mim.run.program import Stage
from eva_mim.run.recipe import Recipe
from eva_mim.run.stage import Built, Networks
from eva_mim.students import HeadSettings
from eva_mim.tasks.objectives import RowLosses
from eva_mim.teachers import TeacherSettings
from eva_mim.trunks.create import build_trunk
from eva_mim.weights.export import write_timm
from eva_mim.weights.files.write import write_safetensors


class ColourTeacher:
    """A teacher: a patch's mean colour, from 0 to 1."""

    width, summary_width, mean, std = 3, 3, (0.5,) * 3, (0.5,) * 3

    def __init__(self, settings: TeacherSettings):
        self.image_size = settings.image_size or 32
        self.grid = (self.image_size // 4, self.image_size // 4)

    def __call__(self, images: Tensor) -> Features:
        spatial = F.avg_pool2d(images.float() / 255, 4).flatten(2).transpose(1, 2)
        return Features(spatial.mean(1), spatial, self.grid)

    def seen(self, grid: Grid) -> tuple[int, Grid]:
        return self.image_size, self.grid

    def to(self, device: Any) -> ColourTeacher:
        return self

    def fingerprint(self) -> str:
        return "0" * 64

    def facts(self) -> dict[str, Any]:
        return {"network": "colours", "image_size": self.image_size, "grid": list(self.grid), "width": self.width}


def wide_head(width: int, target: int, settings: HeadSettings) -> nn.Module:
    """A head: one hidden layer."""
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, target))


def absolute(prediction: Tensor, target: Tensor) -> RowLosses:
    """An objective: absolute error of each of [M, C], a mean over C."""
    return RowLosses((prediction.float() - target.float()).abs().mean(-1), {"largest": target.amax(-1)})


# ---- a task with its program


class Brightness(nn.Module):
    """A student: a trunk and the mean brightness of the image."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        self.trunk = build_trunk(recipe.student, num_classes=0)
        self.image_size = 32
        self.out = nn.Linear(self.trunk.num_features, 1)

    def forward(self, images: Tensor) -> Tensor:
        """[B] from uint8 images."""
        return self.out(self.trunk(images.float() / 255))[:, 0]


class BrightnessRecipe(Recipe):
    """Settings of the stage."""

    view: ViewSettings = ViewSettings()


class BrightnessTask(Task):
    """Squared error of the brightness."""

    def __init__(self, student: nn.Module):
        self.student = student

    def loss(self, student: Callable[..., Any], batch: LabelledBatch) -> StepOutput:
        wanted = batch.images.float().mean((1, 2, 3)) / 255
        return StepOutput({"brightness": LossTerm(F.mse_loss(student(batch.images).float(), wanted))}, {})


class BrightnessEvaluator:
    """Mean absolute error on held-out images."""

    headline = "error"

    def __init__(self, val: Any):
        self.val = val

    def __call__(self, student: nn.Module, autocast: Callable[[], Any]) -> dict[str, float]:
        errors = [student(batch.images) - batch.images.float().mean((1, 2, 3)) / 255 for batch in self.val]
        return {"error": float(torch.cat(errors).abs().mean())}


def networks(recipe: BrightnessRecipe, classes: int | None = None, *, weights: bool = True) -> Networks:
    """The student of the toy stage."""
    return Networks(Brightness(recipe))


def build(recipe: BrightnessRecipe, device: torch.device) -> Built:
    """Parts of the toy stage."""
    splits, student = open_splits(recipe.data), networks(recipe).student
    train = train_loader(recipe, splits.train, TrainView(recipe.view, [32]), LabelledPreparation)
    evaluator = BrightnessEvaluator(eval_loader(recipe, splits.val, EvalView([32]), LabelledPreparation))

    def export(out: Path, weights: dict[str, Tensor]) -> None:
        write_timm(out, student.trunk, recipe.student, {n[6:]: v for n, v in weights.items() if n.startswith("trunk.")})

    return Built(Parts(BrightnessTask(student), train, evaluator, recipe.data.max_broken), export, splits.facts())


STAGE = Stage("brightness", BrightnessRecipe, networks, build)


# ---- a command


def main(argv: Sequence[str] | None = None) -> int:
    """The command: SHA-256 of a file."""
    (path,) = argv or ()
    sys.stdout.write(f"{sha256(Path(path))}\n")
    return 0


# ---- a format


def write_counted(model: Model, folder: Path, dtype: str | None) -> KeyReport:
    """Weights as safetensors, with their number beside them."""
    write_safetensors(folder / "model.safetensors", model.weights, dtype=dtype)
    (folder / "count.json").write_text(json.dumps(len(model.weights)))
    return KeyReport()


def run_counted(path: Path, model: Model, images: Tensor, tokens: Tensor | None) -> dict[str, Tensor]:
    """Outputs of what was written."""
    return reopened(path / "model.safetensors", model, images, tokens)
