"""Masked feature pretraining: a student learns a frozen teacher's features of the patches it does not see.

Expect the held-out cosine to rise above `cosine_of_mean` within the first epoch; where it does not, the teacher's map is
(nearly) constant or the student sees nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eva_mim.data import MaskSettings, ViewSettings
from eva_mim.program import leave, run_program
from eva_mim.recipe import Recipe
from eva_mim.students import TrunkSettings
from eva_mim.teachers import TeacherSettings

if TYPE_CHECKING:
    import torch

    from eva_mim.stage import Built


class StageRecipe(Recipe):
    """Settings of the masked-feature stage."""

    teacher: TeacherSettings
    student: TrunkSettings
    mask: MaskSettings = MaskSettings()
    view: ViewSettings = ViewSettings()

    def parents(self) -> dict[str, Path]:
        """Also the teacher, when it is a stage or a file of ours."""
        found = super().parents()
        if self.teacher.kind == "stage":
            found["teacher.name"] = Path(self.teacher.name)
        elif self.teacher.weights is not None and Path(self.teacher.weights).is_file():
            found["teacher.weights"] = Path(self.teacher.weights)
        return found


def build(recipe: StageRecipe, device: torch.device) -> Built:
    """Teacher, student, data and evaluator of a recipe."""
    from eva_mim.assemble import eval_loader, seed_from, train_loader
    from eva_mim.data.masking import BlockMask
    from eva_mim.data.splits import open_splits
    from eva_mim.evaluate import MaskedFeatureEvaluator
    from eva_mim.export import grid_of, part, unpooled, write_timm
    from eva_mim.files import write_weights
    from eva_mim.loop import Parts
    from eva_mim.stage import Built
    from eva_mim.students.masked import MaskedStudent
    from eva_mim.task import MaskedFeatures
    from eva_mim.teachers import build_teacher

    splits = open_splits(recipe.data)
    teacher = build_teacher(recipe.teacher)
    student = MaskedStudent(recipe.student, teacher.width)
    task = MaskedFeatures(student, teacher)
    teacher.to(device)
    sizes = [student.image_size, teacher.image_size]
    mask = BlockMask(student.grid, recipe.mask)
    evaluator = MaskedFeatureEvaluator(
        task,
        eval_loader(recipe, splits.val, sizes, mask=mask),
        eval_loader(recipe, splits.train, sizes[:1], limit=5000),
        labelled=splits.val.classes is not None,
        device=device,
    )

    def export(out: Path, weights: dict[str, torch.Tensor]) -> None:
        write_timm(out, student.trunk, recipe.student, part(weights, "trunk."), global_pool=unpooled(student.trunk))
        write_weights(out / "head.safetensors", {n: v for n, v in weights.items() if not n.startswith("trunk.")})

    train = train_loader(recipe, splits.train, sizes, recipe.view, mask=mask)
    return Built(
        Parts(task, train, evaluator, recipe.data.max_broken),
        export,
        grid=grid_of(student.trunk),
        seeded=seed_from(recipe.init_from, student.trunk),
        teacher=teacher,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage; returns the exit code."""
    return run_program("pretrain.mim", "mim", argv, "Masked feature pretraining with a frozen teacher.")


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
