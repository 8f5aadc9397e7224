"""What a student learns from each teacher of a masked stage, by the recipe: heads, losses and normalisers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from eva_mim.core.contracts import Teacher
from eva_mim.core.errors import UserError
from eva_mim.core.registry import OBJECTIVES, lookup
from eva_mim.students.heads import HeadPlan, last_layer
from eva_mim.students.masked import MaskedStudent
from eva_mim.targets.normalise import Normaliser
from eva_mim.tasks.masked import Lesson
from eva_mim.tasks.objectives import SummaryAngle, summary_cosine

if TYPE_CHECKING:
    from pretrain.mim import StageRecipe


def plan_of(recipe: StageRecipe, name: str, teacher: Teacher) -> HeadPlan:
    """Returns what the student predicts of a teacher. Raises UserError for a summary that the teacher does not have."""
    objective, own = recipe.objective_of(name), recipe.all_teachers[name]
    if objective.summary and not teacher.summary_width:
        raise UserError(f"objective.summary={objective.summary}: {own.path} ({own.name}) has no summary; give it losses of its "
                        f"own: {own.path}.objective.kind={objective.kind}")
    path = f"{own.path}.head" if own.head else "student.head"
    return HeadPlan(teacher.width if objective.kind else 0, teacher.summary_width if objective.summary else 0,
                    recipe.head_of(name), path)


def lessons_of(recipe: StageRecipe, teachers: Mapping[str, Teacher], device: torch.device) -> dict[str, Lesson]:
    """Returns what the student learns from each teacher, by name. Raises UserError for an unknown objective."""
    lessons = {}
    for name, teacher in teachers.items():
        own, objective, normaliser = recipe.all_teachers[name], recipe.objective_of(name), recipe.normaliser_of(name)
        path = f"{own.path}.objective.kind" if own.objective else "objective.kind"
        angle = objective.summary == "angle"
        lessons[name] = Lesson(
            lookup(OBJECTIVES, objective.kind, path) if objective.kind else None,
            own.weight * objective.masked, own.weight * objective.visible,
            (SummaryAngle(teacher.summary_width).to(device) if angle else summary_cosine) if objective.summary else None,
            own.weight * objective.summary_weight,
            Normaliser(normaliser, teacher.width, own.path).to(device) if normaliser.kind != "none" and objective.kind else None,
            recipe.head_of(name).upsample,
            objective.kind != "cosine",
        )
    return lessons


def folded(student: MaskedStudent, weights: dict[str, Tensor], lessons: Mapping[str, Lesson]) -> dict[str, Tensor]:
    """Returns weights of heads whose outputs are in the teachers' own spaces: normalisers are folded into the last layers."""
    found = dict(weights)
    for name, lesson in lessons.items():
        if lesson.normaliser is None:
            continue
        head = student.head[name] if isinstance(student.head, nn.ModuleDict) else student.head
        last = last_layer(head)
        (place,) = (path for path, module in student.named_modules() if module is last)
        fine = lesson.upsample**2  # the cells of a patch are one after the other in the rows of the layer
        parts = [lesson.normaliser.fold(weight, bias) for weight, bias in zip(
            found[f"{place}.weight"].chunk(fine), found[f"{place}.bias"].chunk(fine), strict=True)]
        found[f"{place}.weight"], found[f"{place}.bias"] = (torch.cat(part) for part in zip(*parts, strict=True))
    return found
