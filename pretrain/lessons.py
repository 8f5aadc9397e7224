"""What a student learns from each teacher of a masked stage, by the recipe: heads, losses and normalisers."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eva_mim.core.batches import MaskedBatch
from eva_mim.core.contracts import Teacher, TrainData
from eva_mim.core.distributed import rank, world_size
from eva_mim.core.errors import UserError
from eva_mim.core.files import write_json, write_weights
from eva_mim.core.log import say
from eva_mim.core.registry import OBJECTIVES, lookup
from eva_mim.core.report import KeyReport
from eva_mim.core.run_folder import HEAD, HEADS_CONFIG, ZEROSHOT, RunFolder, head_file
from eva_mim.core.settings import few
from eva_mim.data.masking import make_mask
from eva_mim.data.preparation import Shown
from eva_mim.data.prompts import prompt_templates
from eva_mim.evaluate.contrastive import class_features
from eva_mim.evaluate.masked import Prompts
from eva_mim.run.loaders import seed_from
from eva_mim.students.heads import HeadPlan, last_layer
from eva_mim.students.masked import MaskedStudent
from eva_mim.students.positions import POSITION_TABLE, table_for
from eva_mim.students.windows import sides_of
from eva_mim.targets.normalise import Normaliser
from eva_mim.tasks.grids import check_grids, fine
from eva_mim.tasks.masked import Lesson, MaskedFeatures
from eva_mim.tasks.objectives import UP_TO_ROTATION, SummaryAngle, summary_cosine
from eva_mim.teachers import TeacherSettings, matched
from eva_mim.teachers.open_clip import TextTower
from eva_mim.trunks import facts
from eva_mim.trunks.create import build_trunk
from eva_mim.trunks.meta import meta_device
from eva_mim.weights.adaptors import heads_facts
from eva_mim.weights.export import part, unpooled, write_timm
from eva_mim.weights.files.read import open_checkpoint

if TYPE_CHECKING:
    from eva_mim.run.stage import Networks
    from pretrain.mim_recipe import StageRecipe


def sized_teachers(recipe: StageRecipe) -> dict[str, TeacherSettings]:
    """Returns the teachers' settings by name, with the sizes that match the student's grids. Raises UserError for a student
    without a grid of patches."""
    found: dict[str, TeacherSettings] = dict(recipe.all_teachers)
    for name, settings in recipe.all_teachers.items():
        if settings.image_size != "match":
            continue
        with meta_device():
            trunk = build_trunk(recipe.student, num_classes=0)
            grid, side = facts.grid(trunk), facts.image_size(trunk, recipe.student)
        if grid is None:
            raise UserError(f"{settings.path}.image_size=match: {recipe.student.name} has no grid of patches")
        sides = {own or side for group in recipe.all_groups.values() if group.teachers is None or name in group.teachers
                 for own in group.sizes or (None,)}
        factors = [Fraction(own, side) * recipe.head_of(name).upsample for own in sorted(sides)]
        grids = [(int(grid[0] * factor), int(grid[1] * factor)) for factor in factors]
        found[name] = matched(settings, grids, recipe.data.channels_of_all)
    return found


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
        summary = (SummaryAngle(teacher.summary_width).to(device) if angle else summary_cosine) if objective.summary else None
        normalised = normaliser.kind != "none" and objective.kind is not None
        if normalised and recipe.head_of(name).kind == "none":
            raise UserError(f"{own.path}: a head of kind none has no layer into which normaliser.kind={normaliser.kind} could be "
                            f"folded; set {own.path}.normaliser.kind=none")
        lessons[name] = Lesson(
            spatial=lookup(OBJECTIVES, objective.kind, path) if objective.kind else None,
            masked=own.weight * objective.masked,
            visible=own.weight * objective.visible,
            summary=summary,
            summary_weight=own.weight * objective.summary_weight,
            normaliser=Normaliser(normaliser, teacher.width, own.path).to(device) if normalised else None,
            turned=normalised and normaliser.kind == "phi_s" and objective.kind in UP_TO_ROTATION and recipe.run.zero_stage != 3,
            upsample=recipe.head_of(name).upsample,
            interpolate=own.interpolate,
            scaled=objective.kind != "cosine",
        )
    return lessons


def _last_layers(student: MaskedStudent, lessons: Mapping[str, Lesson]) -> Iterator[tuple[str, Normaliser, int]]:
    """Yields the name of the last layer of each head of normalised features, the normaliser, and the number of its cells."""
    for name, lesson in lessons.items():
        if lesson.normaliser is None:
            continue
        last = last_layer(student.head[name] if isinstance(student.head, nn.ModuleDict) else student.head)
        (place,) = (path for path, module in student.named_modules() if module is last)
        yield place, lesson.normaliser, lesson.upsample**2


def folded(
    student: MaskedStudent, weights: Mapping[str, Tensor], lessons: Mapping[str, Lesson], *, back: bool = False
) -> dict[str, Tensor]:
    """Returns weights of heads whose outputs are in the teachers' own spaces: normalisers are folded into the last layers.
    `back`: from such weights those of heads with normalised outputs."""
    found = dict(weights)
    for place, normaliser, cells in _last_layers(student, lessons):  # cells are one after the other in the rows of the layer
        change = normaliser.unfold if back else normaliser.fold
        pairs = zip(found[f"{place}.weight"].chunk(cells), found[f"{place}.bias"].chunk(cells), strict=True)
        changed = [change(weight, bias) for weight, bias in pairs]
        found[f"{place}.weight"], found[f"{place}.bias"] = (torch.cat(part) for part in zip(*changed, strict=True))
    return found


def seed_student(recipe: StageRecipe, student: MaskedStudent) -> KeyReport | None:
    """Seeds the trunk of a student in place from `init_from`, with the whole table of positions where that is an earlier stage's;
    returns a report, None without `init_from`. Raises UserError."""
    report = seed_from(recipe, student.trunk)
    if recipe.init_from is not None and recipe.student.positions == "cropped":
        there = Path(recipe.init_from) / HEAD
        table = dict(open_checkpoint(there)).get(POSITION_TABLE) if there.is_file() else None
        if table is not None and table.shape == student.trunk.pos_embed.shape:
            student.trunk.pos_embed.data.copy_(table)
            say(f"  the whole table of positions from {there}")
    return report


def start_heads(recipe: StageRecipe, student: MaskedStudent, teachers: Mapping[str, Teacher]) -> list[str]:
    """Starts the heads of a student by those in `init_heads`, in place; returns the teachers whose heads were there. Raises
    UserError for heads of another kind or size, and for one that was trained for another teacher under the same name."""
    if recipe.init_heads is None:
        return []
    folder = Path(recipe.init_heads)
    before = RunFolder(folder).record().get("teachers", {})
    tensors = dict(open_checkpoint(head_file(folder)))
    state, found, taken = student.state_dict(), list[str](), set[str]()
    for name, teacher in teachers.items():
        parts = [f"{head}.{name}." for head in ("head", "summary_head")] if len(student.summary_head) or isinstance(
            student.head, nn.ModuleDict) else ["head."]
        own = {key for key in tensors if key.startswith(tuple(parts))}
        wanted = {key for key in state if key.startswith(tuple(parts))}
        if not own:
            continue
        if name in before and before[name]["sha256"] != teacher.fingerprint():
            raise UserError(f"init_heads={folder}: its heads for {name} were trained for other weights of that teacher (sha256 "
                            f"{before[name]['sha256'][:12]}, now {teacher.fingerprint()[:12]}); call the teacher something else")
        wrong = [key for key in sorted(own | wanted) if key not in tensors or key not in state
                 or tensors[key].shape != state[key].shape]
        if wrong:
            raise UserError(f"init_heads={folder}: its heads for {name} are of another kind or size: {few(wrong, 3)}; give "
                            "student.head and objective as there, or call the teacher something else")
        found.append(name)
        taken |= own
    if not found:
        raise UserError(f"init_heads={folder}: it has no heads for {', '.join(teachers)}")
    student.load_state_dict({key: tensors[key] for key in taken}, strict=False)
    new = [name for name in teachers if name not in found]
    say(f"  heads of {', '.join(found)} from {folder}" + (f"; new ones for {', '.join(new)}" if new else ""))
    return found


def measured_and_unfolded(task: MaskedFeatures, started: Sequence[str], train: TrainData, device: torch.device) -> None:
    """Measures the features of the first step, and turns heads that speak in the teachers' own spaces into such that speak in
    normalised ones, by these statistics. Every rank must call."""
    lessons = {name: task.lessons[name] for name in started if task.lessons[name].normaliser is not None}
    if not lessons:
        return
    with closing(cast(Generator[list[MaskedBatch], None, None], train.steps(0, 1))) as steps:
        task.measure([batch.to(device) for batch in next(steps)])
    state = task.student.state_dict()
    task.student.load_state_dict(folded(cast(MaskedStudent, task.student), state, lessons, back=True))


def export(
    recipe: StageRecipe, made: Networks, lessons: Mapping[str, Lesson], prompts: Prompts | None, out: Path,
    weights: dict[str, Tensor],
) -> None:
    """Writes a finished student: the trunk as timm opens it, the heads with what they are made of, and vectors of classes."""
    student: MaskedStudent = made.student
    trunk = part(weights, "trunk.")
    outside = {name: value for name, value in weights.items() if not name.startswith("trunk.")}
    if recipe.student.positions == "cropped":  # timm gets a table for the student's own size, the whole one lies beside it
        outside[POSITION_TABLE] = trunk["pos_embed"]
        trunk["pos_embed"] = table_for(student.trunk, trunk["pos_embed"], student.grid)
    write_timm(out, student.trunk, recipe.student, trunk, global_pool=unpooled(student.trunk), crop_pct=recipe.view.crop_pct)
    write_weights(out / HEAD, folded(student, outside, lessons))
    write_json(out / HEADS_CONFIG, heads_facts(student).model_dump(mode="json"))
    if prompts is not None:
        write_weights(out / ZEROSHOT, {prompts.teacher: prompts.vectors})


def class_vectors(recipe: StageRecipe, classes: Sequence[str] | None, device: torch.device) -> Prompts | None:
    """Returns the vectors of the classes by the text tower of `evaluate.zeroshot`; None without it. Every rank must call. Raises
    UserError for a teacher without a text tower, and for images without classes."""
    name = recipe.evaluate.zeroshot
    if name is None:
        return None
    if classes is None:
        raise UserError(f"evaluate.zeroshot={name}: the held-out images have no classes")
    tower = TextTower(recipe.all_teachers[name]).to(device)
    vectors = class_features(lambda texts: F.normalize(tower(texts), dim=-1), tower.tokenize, classes,
                             prompt_templates(recipe.data.templates), nullcontext, device)
    return Prompts(name, vectors)


def check_sizes(recipe: StageRecipe, student: MaskedStudent, teachers: Mapping[str, Teacher]) -> None:
    """Raises UserError, with the ways out, for a teacher whose grid of patches is not the student's at a size at which it
    teaches, unless it is interpolated."""
    for group in recipe.all_groups.values():
        for side in group.sizes or (student.image_size,):
            for name in group.teachers or recipe.all_teachers:
                if recipe.objective_of(name).kind and recipe.all_teachers[name].interpolate is None:
                    check_grids(student.grid_at(side), side, teachers[name], recipe.all_teachers[name].path,
                                recipe.head_of(name).upsample)


def side_seen(
    recipe: StageRecipe, student: MaskedStudent, teachers: Mapping[str, Teacher], name: str, side: int | None
) -> int:
    """Returns the side in pixels of the images that a teacher sees beside the student's of `side` (None: its own)."""
    grid = fine(student.grid_at(side), recipe.head_of(name).upsample)
    return teachers[name].seen(grid)[0]


def check_mosaics(recipe: StageRecipe, made: Networks) -> None:
    """Raises UserError for a micro-batch that leaves a mosaic incomplete: its features would depend on how a batch is cut."""
    groups = list(recipe.all_groups.values())
    for piece in recipe.pieces(rank(), world_size()):
        group, images = groups[piece.group], piece.last - piece.first
        for name in group.teachers or recipe.all_teachers:
            if not recipe.all_teachers[name].mosaic:
                continue
            for side in group.sizes or (made.student.image_size,):
                seen = side_seen(recipe, made.student, made.teachers, name, side)
                many = (made.teachers[name].image_size // seen) ** 2
                if images % many:
                    raise UserError(f"{recipe.all_teachers[name].path}.mosaic: {many} images of {seen} px share an input, and a "
                                    f"micro-batch has {images}; set micro_batch to a multiple")


def shown_by_group(recipe: StageRecipe, student: MaskedStudent, live: Mapping[str, Teacher]) -> list[list[Shown]]:
    """Returns what each group of teachers sees of an image at each of the student's sizes. `live`: teachers that see images."""
    found, windows = [], recipe.student.windows.sides if recipe.student.windows else ()
    for group in recipe.all_groups.values():
        names = group.teachers or tuple(recipe.all_teachers)
        shown = []
        for side in group.sizes or (student.image_size,):
            theirs = (side_seen(recipe, student, live, name, side) for name in names if name in live)
            grid = student.grid_at(side)
            shown.append(Shown(side, (side, *theirs), make_mask(grid, recipe.mask), names, tuple(sides_of(grid, windows))))
        found.append(shown)
    return found
