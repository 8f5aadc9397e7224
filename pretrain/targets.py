"""Targets of a pretraining stage: what they depend on, and whether a store has those of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from eva_mim.core.contracts import Teacher
from eva_mim.core.distributed import run_on_main
from eva_mim.core.errors import UserError
from eva_mim.core.log import say
from eva_mim.core.rng import derive, isolated
from eva_mim.core.settings import differences, few
from eva_mim.data.sampler import evenly
from eva_mim.data.splits import Splits, pixels_of
from eva_mim.data.store.files import Dtype, FeatureStore, SplitFacts, StoreFacts, read_facts
from eva_mim.data.store.write import described
from eva_mim.data.view_settings import MaskSettings, ViewSettings
from eva_mim.run.loaders import seed_from
from eva_mim.targets.cached import StoredTeacher
from eva_mim.teachers import TeacherSettings, build_teacher
from eva_mim.teachers.frozen import FrozenTeacher
from eva_mim.teachers.trunk import read_trunk
from eva_mim.trunks import facts as trunk_facts
from eva_mim.trunks.create import build_trunk
from eva_mim.weights.files.read import content_hash

if TYPE_CHECKING:
    from eva_mim.run.recipe import Recipe
    from eva_mim.teachers.open_clip import TextTower


class Wanted(NamedTuple):
    """What a recipe wants of a store of targets."""

    recipe: Recipe
    teachers: Mapping[str, TeacherSettings]
    """By name."""
    setting: str
    """Path of the setting with the store's folder."""
    folder: Path | None
    """None: there is none."""
    held_out: int
    """Most held-out images that have targets."""
    patches: bool
    """True for spatial features and summaries, False for summaries alone."""
    mask: MaskSettings | None = None
    """What hides patches, None if nothing does."""
    captions: bool = False
    """True for embeddings of captions as well."""

    @property
    def called(self) -> str:
        """The setting with its value, for messages."""
        return f"{self.setting}={self.folder}"

    def teacher_networks(self, *, weights: bool = True) -> dict[str, Teacher]:
        """Returns the teachers by name. Raises UserError."""
        with isolated(derive(self.recipe.run.seed, "teachers")):  # the student begins with the same weights, whoever teaches it
            channels = self.recipe.data.channels_of_all
            return {name: start_teacher(self.recipe, one, weights=weights) if one.kind == "start"
                    else build_teacher(one, channels, weights=weights) for name, one in self.teachers.items()}

    def check_storable(self) -> None:
        """Raises UserError for a teacher whose features of an image depend on more than its view."""
        for one in self.teachers.values():
            if one.mosaic:
                raise UserError(f"{one.path}.mosaic: features would depend on the other images of a mosaic; leave it out for a "
                                "cache")
            if one.follows:
                raise UserError(f"{one.path}.image_size=match: a cache has features of one size, and the student has several; "
                                f"give the teacher's size in pixels, and {one.path}.interpolate=student")

    def positions(self, splits: Splits) -> list[int]:
        """Returns the held-out images that have targets."""
        return evenly(len(splits.val), self.held_out) if self.held_out else []


def start_teacher(recipe: Recipe, settings: TeacherSettings, *, weights: bool) -> FrozenTeacher:
    """Returns a frozen copy of the student's trunk as `init_from` brings it: an anchor. Its summary is the class token, or
    without one the mean of the patches. Raises UserError for a recipe without `init_from`."""
    if recipe.init_from is None:
        raise UserError(f"{settings.path}.kind=start is a copy of what init_from brings; set init_from, or leave this teacher "
                        "out")
    several = {"dynamic_img_size": True} if settings.follows else {}
    trunk: Any = build_trunk(recipe.student, num_classes=0, global_pool="", **several)
    if weights:
        seed_from(recipe, trunk)
    if settings.summary is None:
        settings = settings.model_copy(update={"summary": "mean" if trunk.cls_token is None else "class_token"})
    mean, std = trunk_facts.mean_std(trunk, recipe.student)
    size = trunk_facts.image_size(trunk, recipe.student)
    return FrozenTeacher(trunk, read_trunk(trunk, settings), settings, image_size=size, mean=mean, std=std)


def facts_of(
    wanted: Wanted, splits: Splits, teachers: Mapping[str, Teacher], views: int, dtype: Dtype, device: torch.device,
    components: int | None, variance: dict[str, float], hidden: int | None, text: TextTower | None,
) -> StoreFacts:
    """Returns what the targets of a recipe depend on, and how they are stored: of training images all patches, or the at most
    `hidden` ones that its masks hide; with `text` the embeddings of captions. Every rank must call."""
    more = {} if text is None else {"caption": text.width, "text_sha256": text.fingerprint()}
    networks = {}
    for name, teacher in teachers.items():
        file = run_on_main(partial(_file_hash, wanted.teachers[name]))
        settings = _settings(wanted.teachers[name], in_file=file is not None)
        networks[name] = described(teacher, len(teacher.mean), device, patches=wanted.patches, file=file, settings=settings,
                                   **more)
    held_out = wanted.positions(splits)
    return StoreFacts(
        networks=networks, inputs=_inputs(wanted, splits, masks=hidden is not None),
        splits={"train": SplitFacts(images=len(splits.train), views=views, hidden=hidden)}
        | ({"val": SplitFacts(images=held_out)} if held_out else {}),
        dtype=dtype, components=components, variance=variance,
    )


def stored_teachers(wanted: Wanted) -> dict[str, StoredTeacher]:
    """Returns a recipe's teachers, whose features are in its store, by name; the store may have more. Raises UserError for a
    store of other teachers."""
    assert wanted.folder is not None
    wanted.check_storable()
    there = read_facts(wanted.folder).networks
    networks = {name: there[name] for name in wanted.teachers if name in there}
    known = {name: one.network for name, one in networks.items()}
    settings = {name: _settings(one, in_file=known.get(name, {}).get("file") is not None)
                for name, one in wanted.teachers.items()}
    before = {name: one.network.get("settings") for name, one in there.items() if name in settings or not networks}
    _refuse(wanted, before, settings, "teachers")
    if wanted.captions and not all(one.caption for one in networks.values()):
        raise UserError(f"{wanted.called} has no embeddings of captions; make another one")
    if wanted.patches and (without := [name for name, one in networks.items() if not one.patches]):
        raise UserError(f"{wanted.called} has summaries of {few(without, 3)} alone, no features of patches; make another one")
    return {name: StoredTeacher(one.network, one.summary) for name, one in networks.items()}


def open_store(wanted: Wanted, splits: Splits) -> FeatureStore | None:
    """Returns a recipe's store of targets; None without one. Every rank must call. Raises UserError for a store of other images,
    views or teachers, which are named."""
    if wanted.folder is None:
        return None
    store, recipe = FeatureStore(wanted.folder), wanted.recipe
    facts = store.facts
    stored_teachers(wanted)
    for name, settings in wanted.teachers.items():
        one = facts.networks[name]
        if (now := run_on_main(partial(_file_hash, settings))) not in (None, one.network["file"]):
            raise UserError(f"{wanted.called} was made with other weights of {settings.path} (sha256 "
                            f"{str(one.network['file'])[:12]}, now {now[:12]}); make another one")
    hidden = facts.splits["train"].hidden
    found = {name: value for name, value in facts.inputs.items() if name != "templates" or wanted.captions}
    _refuse(wanted, found, _inputs(wanted, splits, masks=hidden is not None), "")
    views = facts.splits["train"].views
    if (recipe.view.count or 1) > views:
        raise UserError(f"view.count={recipe.view.count}: {wanted.called} has {views} views; leave it out, or take fewer")
    known = facts.splits["val"].positions if "val" in facts.splits else ()
    if missing := set(wanted.positions(splits)) - set(known):
        raise UserError(f"evaluate.images={wanted.held_out}: {wanted.called} has {len(known)} held-out images, and lacks "
                        f"{len(missing)} of these")
    count = recipe.view.count or views
    if recipe.run.epochs is not None and recipe.run.epochs > count:
        say(f"  {wanted.setting}: {recipe.run.epochs} epochs take turns with {count} views of each image")
    return store


def view_of(recipe: Recipe, store: FeatureStore | None) -> ViewSettings:
    """Returns the settings of a recipe's views, which come again after those that a store has."""
    return recipe.view if store is None else recipe.view.model_copy(
        update={"count": recipe.view.count or store.facts.splits["train"].views})


def _refuse(wanted: Wanted, found: Mapping[str, Any], asked: Mapping[str, Any], prefix: str) -> None:
    if changed := differences(found, asked, f"{prefix}." if prefix else ""):
        raise UserError(f"{wanted.called} has other targets (cache -> recipe): {few(changed, 5)}"
                        + ("; view.seed is run.seed unless it is set" if any("view.seed" in line for line in changed) else ""))


def _settings(settings: TeacherSettings, *, in_file: bool) -> dict[str, Any]:
    """Returns the settings of a teacher that its features depend on; of weights in a file (`in_file`) not the place."""
    place = {"name"} if settings.kind == "stage" else {"weights"}
    kept = TeacherSettings.model_fields.keys() - {"weight", "micro_batch", *(place if in_file else ())}
    return settings.model_dump(mode="json", include=kept)


def _file_hash(settings: TeacherSettings) -> str | None:
    """Returns the SHA-256 of a teacher's weights in a local file or folder; None if they are in none, or not here."""
    place = settings.name if settings.kind == "stage" else settings.weights
    return content_hash(place) if place is not None and Path(place).exists() else None


def _inputs(wanted: Wanted, splits: Splits, *, masks: bool) -> dict[str, Any]:
    """Returns what decides the images, their pixels, their views, perhaps their masks and captions, and the precision, in JSON's
    types."""
    recipe = wanted.recipe
    seed = recipe.run.seed if recipe.view.seed is None else recipe.view.seed
    view = recipe.view.model_dump(mode="json", exclude={"count", "seed"}) | {"seed": seed}
    found = {"precision": recipe.run.precision, "view": view, "data": splits.facts() | {"records": pixels_of(recipe.data)}}
    if wanted.captions:
        found["templates"] = recipe.data.templates
    return found | {"mask": wanted.mask.model_dump(mode="json")} if masks and wanted.mask else found
