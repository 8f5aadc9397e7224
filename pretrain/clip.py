"""Contrastive image-text training: from scratch, or with an image tower seeded by an earlier stage.

Expect the loss to start near ln(global batch) and zero-shot accuracy to leave chance within the first epoch.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import model_validator

from eva_mim.core.errors import UserError
from eva_mim.core.files import sha256
from eva_mim.core.run_folder import store_index
from eva_mim.data.view_settings import ViewSettings
from eva_mim.run.program import Stage, leave
from eva_mim.run.recipe import Recipe
from eva_mim.students import ClipSettings, clip_file
from eva_mim.tasks import ContrastiveSettings

if TYPE_CHECKING:
    import torch

    from eva_mim.core.contracts import Source, Teacher
    from eva_mim.data.store.files import FeatureStore
    from eva_mim.run.stage import Built, Networks
    from eva_mim.students.clip import ClipStudent
    from pretrain.targets import Wanted


TEACHER = "teacher"
"""Name of the only teacher in a store."""
TARGETS = {"image": f"{TEACHER}.summary", "text": f"{TEACHER}.caption"}
"""By the student's name of a prediction the name of its target in a store."""
CAPTIONS_LOOKED_AT = 64
"""Records whose captions are measured at the start."""


class StageRecipe(Recipe):
    """Settings of a CLIP stage."""

    student: ClipSettings
    contrastive: ContrastiveSettings = ContrastiveSettings()
    view: ViewSettings = ViewSettings(crop_scale=(0.9, 1.0), flip=0.0)

    @model_validator(mode="after")
    def _sigmoid_has_a_bias(self) -> StageRecipe:
        if self.contrastive.kind == "siglip" and self.student.init_logit_bias is None:
            raise ValueError("contrastive.kind=siglip needs a logit bias; set student.init_logit_bias (SigLIP: -10, with "
                             "student.init_logit_scale=2.3026, which is ln 10)")
        return self

    @model_validator(mode="after")
    def _views_are_open_clips(self) -> StageRecipe:
        if self.view.erase:
            raise ValueError(f"view.erase={self.view.erase} is for classifiers; set it to 0")
        if self.view.crop_pct != 1:
            raise ValueError(f"view.crop_pct={self.view.crop_pct}: open_clip resizes the short side to the image size; set 1")
        return self

    @model_validator(mode="after")
    def _student_takes_the_images(self) -> StageRecipe:
        for setting, channels in (("data.channels", self.data.channels_of_all), ("student.mean", self.student.channels)):
            if channels != 3:
                raise ValueError(f"{setting} is for {channels} channels: open_clip builds image towers for 3 alone; take RGB, or "
                                 "learn from a teacher or labels instead (mim, classify)")
        return self

    @model_validator(mode="after")
    def _locked_image_tower_is_trained(self) -> StageRecipe:
        if self.student.lock_image and self.init_from is None:
            raise ValueError("student.lock_image=true keeps a trained trunk as it is; set init_from")
        return self

    @model_validator(mode="after")
    def _a_clip_model_is_somewhere(self) -> StageRecipe:
        if self.student.init == "clip" and self.init_from is None:
            raise ValueError("student.init=clip needs init_from, a CLIP model")
        return self

    def parents(self) -> dict[str, Path]:
        """Returns the parents of every recipe, and the stage from which the text tower is taken."""
        found = super().parents()
        if self.student.init == "clip" and self.init_from is not None:
            found["init_from"] = clip_file(self.init_from)
        if self.student.text.init_from is not None and Path(self.student.text.init_from).is_dir():
            found["student.text.init_from"] = Path(self.student.text.init_from)
        if self.contrastive.distill is not None and self.contrastive.distill.cached is not None:
            found["contrastive.distill.cached"] = self.contrastive.distill.cached
        return found

    def parent_hash(self, name: str, path: Path) -> str:
        """See `Recipe`; of a store of targets the hash of its index, which has those of all files."""
        return sha256(store_index(path)) if name == "contrastive.distill.cached" else super().parent_hash(name, path)


def targets_of(recipe: StageRecipe) -> Wanted | None:
    """Returns what the stage wants of a store of targets; None without distillation."""
    from pretrain.targets import Wanted

    distill = recipe.contrastive.distill
    if distill is None:
        return None
    return Wanted(recipe, {TEACHER: distill.teacher}, "contrastive.distill.cached", distill.cached, 0, patches=False,
                  captions=distill.captions)


def networks(recipe: StageRecipe, classes: int | None = None, *, weights: bool = True) -> Networks:
    """Returns the CLIP student. Without `weights` nothing is read and the text tower is not locked, since only trained weights
    can be."""
    from eva_mim.run.stage import Networks
    from eva_mim.students.clip import ClipStudent
    from eva_mim.weights.clip import with_text_of

    teachers: dict[str, Teacher] = {}
    widths: dict[str, int] = {}
    if (wanted := targets_of(recipe)) is not None:
        from eva_mim.data.store.files import read_facts
        from pretrain.targets import stored_teachers

        if wanted.folder is None:
            raise UserError(f"{wanted.setting} must be given: `eva-mim cache RECIPE --views K --out DIR` makes it")
        teachers |= stored_teachers(wanted)
        stored = read_facts(wanted.folder).networks[TEACHER]
        widths |= {"image": stored.summary} | ({"text": stored.caption} if wanted.captions else {})
    settings = recipe.student
    if not weights:
        text = settings.text.model_copy(update={"weights": None, "projection": None})
        settings = settings.model_copy(update={"text": text, "lock_text": False})
    elif settings.init == "clip" and recipe.init_from is not None:
        settings = with_text_of(settings, recipe.init_from)
    return Networks(ClipStudent(settings, weights=weights, distilled=widths), teachers)


def say_cut_captions(student: ClipStudent, source: Source) -> None:
    """Says how many of a few captions, evenly spread, are cut at the student's context length. Every rank must call."""
    from eva_mim.core.distributed import run_on_main
    from eva_mim.core.log import say
    from eva_mim.data.splits import glances
    from eva_mim.students.clip import token_counts

    def look() -> None:
        length, found = student.model.context_length, glances(source, CAPTIONS_LOOKED_AT)
        counts = token_counts([text for sample in found if not isinstance(sample, Exception) for text in sample.captions])
        if cut := sum(count > length for count in counts):
            say(f"  captions: {cut} of {len(counts)} looked at are cut after student.text.context_length={length} tokens; the "
                f"longest has {max(counts)}")

    run_on_main(look)


def _along(recipe: StageRecipe, store: FeatureStore | None) -> dict[str, Any]:
    """Returns how stored embeddings come along with training images, as arguments of a preparation."""
    if store is None or recipe.contrastive.distill is None:
        return {}
    return {"stored": partial(store.row, "train"),
            "with_views": ("view", "caption") if recipe.contrastive.distill.captions else ("view",)}


def build(recipe: StageRecipe, device: torch.device) -> Built:
    """Returns student, data and evaluator of a recipe."""
    from eva_mim.core.files import write_json, write_weights
    from eva_mim.core.log import say
    from eva_mim.core.report import KeyReport
    from eva_mim.core.run_folder import CLIP_CONFIG, CLIP_WEIGHTS
    from eva_mim.data.preparation import ImageTextPreparation
    from eva_mim.data.prompts import prompt_templates
    from eva_mim.data.splits import open_splits
    from eva_mim.data.views import EvalView, TrainView
    from eva_mim.evaluate.contrastive import ClipEvaluator
    from eva_mim.run.loaders import eval_loader, seed_from, train_loader
    from eva_mim.run.loop import Parts
    from eva_mim.run.stage import Built
    from eva_mim.students.clip import as_open_clip
    from eva_mim.tasks.contrastive import Contrastive, ImageText
    from eva_mim.weights.clip import init_clip_from_clip
    from eva_mim.weights.export import grid_of, part, unpooled, write_timm
    from pretrain.targets import open_store, view_of

    splits, wanted = open_splits(recipe.data), targets_of(recipe)
    made = networks(recipe)
    student, store = made.student, open_store(wanted, splits) if wanted else None
    tokenize = student.tokenizer()
    sizes = [student.image_size]
    paired = partial(ImageTextPreparation, tokenize=tokenize, templates=prompt_templates(recipe.data.templates))
    classes = splits.val.classes
    if classes is not None and (without := splits.val.unlabelled()):
        say(f"  {len(without)} of the {len(splits.val)} held-out records have no label, such as {splits.val.key(without[0])}: "
            "no zero-shot figures")
        classes = None
    evaluator = ClipEvaluator(
        eval_loader(recipe, splits.val, EvalView(sizes, recipe.view.crop_pct), paired),
        tokenize=tokenize,
        classes=classes,
        templates=recipe.data.templates,
        device=device,
    )

    def export(out: Path, weights: dict[str, torch.Tensor]) -> None:
        trunk = part(weights, "model.visual.trunk.")
        write_timm(out, student.trunk, recipe.student, trunk, global_pool=unpooled(student.trunk),
                   crop_pct=recipe.view.crop_pct)
        write_weights(out / CLIP_WEIGHTS, as_open_clip(part(weights, "model.")))
        write_json(out / CLIP_CONFIG, student.open_clip_config())

    say_cut_captions(student, splits.train)
    view = TrainView(view_of(recipe, store), sizes)
    train = train_loader(recipe, splits.train, view, partial(paired, **_along(recipe, store)))
    weight = recipe.contrastive.distill.teacher.weight if recipe.contrastive.distill else 1.0
    task = ImageText(student, Contrastive(recipe.contrastive), {name: TARGETS[name] for name in student.distilled}, weight)
    if recipe.student.init == "clip" and recipe.init_from is not None:
        seeded: KeyReport | None = init_clip_from_clip(student, recipe.init_from, recipe.student, recipe.hand_over)
    else:
        seeded = seed_from(recipe, student.trunk)
        for name in student.model.visual.head.state_dict() if seeded else ():
            seeded.note(seeded.new, f"visual.head.{name}", "the projection into the shared space")
    if student.text_report is not None:
        seeded = (seeded or KeyReport()).beside(student.text_report)
    return Built(
        Parts(task, train, evaluator, recipe.data.max_broken),
        export,
        splits.facts(),
        classes=splits.train.classes,
        grid=grid_of(student.trunk),
        seeded=seeded,
        teachers=made.teachers,
    )


STAGE = Stage("clip", StageRecipe, networks, build)
main = STAGE.main


if __name__ == "__main__":
    leave(main())
