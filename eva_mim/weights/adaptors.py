"""Finished stages as networks: summary and patches of an image, and of a masked stage what each teacher would say (adaptors)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ValidationError
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from eva_mim.core.contracts import Features, Grid
from eva_mim.core.errors import UserError
from eva_mim.core.run_folder import CLIP_CONFIG, HEAD, HEADS_CONFIG, TIMM_CONFIG
from eva_mim.core.settings import few
from eva_mim.students import HeadSettings
from eva_mim.students.heads import HeadPlan, Heads, Patches, build_heads, predict
from eva_mim.students.masked import MaskedStudent
from eva_mim.students.positions import POSITION_TABLE, read_cropped
from eva_mim.students.windows import add_windows, sides_of, windowed
from eva_mim.teachers import TeacherSettings
from eva_mim.teachers.frozen import FrozenTeacher, Reading
from eva_mim.teachers.trunk import read_trunk
from eva_mim.trunks import facts
from eva_mim.trunks.create import create
from eva_mim.trunks.maps import final_grid, tokens_and_grid
from eva_mim.weights.files.formats import read_json
from eva_mim.weights.files.read import open_checkpoint

BACKBONE = "backbone"
"""Name of the trunk's own output beside those of adaptors."""


class HeadFacts(BaseModel, extra="forbid", frozen=True):
    """What a teacher's heads are made of."""

    head: dict[str, Any]
    """`HeadSettings`, with the width of hidden layers."""
    spatial: int
    """Width of the teacher's patches; 0: they are not predicted."""
    summary: int
    """Width of its summary; 0: it is not predicted."""
    class_token: int
    """Position of the token that its summary is predicted from; -1: the mean of the patches."""


class HeadsFacts(BaseModel, extra="forbid", frozen=True):
    """Content of `heads.json`."""

    teachers: dict[str, HeadFacts]
    """By name; in the file of heads those of NAME begin with head.NAME. and summary_head.NAME., or with head. if `single`."""
    single: bool
    """True for one teacher whose head has no name."""
    global_blocks: int | None = None
    """Blocks that see all patches where windows are used; None: the student was trained without."""
    position_grid: int | None = None
    """Places a side of the whole table of positions among the tensors of heads; None: the trunk has all positions."""


class Output(NamedTuple):
    """Features of images."""

    summary: Tensor
    """[B, C'], one vector an image."""
    spatial: Tensor
    """[B, N, C], one vector a patch, row by row."""


def heads_facts(student: MaskedStudent) -> HeadsFacts:
    """Returns the content of `heads.json` for a student."""
    single = not isinstance(student.head, nn.ModuleDict)
    widest = max(max(plan.spatial, plan.summary) for plan in student.plans.values())
    teachers = {}
    for name, plan in student.plans.items():
        settings = plan.settings.model_dump(mode="json")
        settings["width"] = settings["width"] or (None if single else widest)
        teachers[name] = HeadFacts(head=settings, spatial=plan.spatial, summary=plan.summary,
                                   class_token=student.class_tokens.get(name, -1))
    windows, whole = student.settings.windows, getattr(student.trunk, "position_grid", None)
    return HeadsFacts(teachers=teachers, single=single, global_blocks=windows.global_blocks if windows else None,
                      position_grid=whole[0] if whole else None)


class FeatureModel(nn.Module):
    """A finished stage as a network from images to features.

    Images are [B, channels, H, W] from 0 to 1; a plain ViT takes any H and W that are multiples of its patch. `adaptors` names
    teachers whose features are predicted, in their own spaces.
    """

    def __init__(
        self, network: Any, reading: Reading, *, image_size: int, patch: tuple[int, int] | None, grid: Grid | None,
        mean: Sequence[float], std: Sequence[float], folder: Path,
    ):
        """`patch`: (height, width) in pixels, None for a network of one size; `grid`: of the patches of its own size."""
        super().__init__()
        self.grid = grid
        self.network, self._reading, self.image_size, self.patch, self.folder = network, reading, image_size, patch, folder
        self.mean, self.std = tuple(mean), tuple(std)
        self.register_buffer("_pixels", torch.tensor([self.mean, self.std]).view(2, -1, 1, 1), persistent=False)
        self.heads, self.summary_heads = nn.ModuleDict(), nn.ModuleDict()
        self._cells: dict[str, int] = {}
        self._class_tokens: dict[str, int] = {}
        self.adaptors: tuple[str, ...] = ()
        """Names of the teachers whose features can be predicted."""
        self.window: int | None = None
        """Side of windows in patches, for a student that was trained with windows: less memory for large images. None: none."""
        self.has_windows = False

    def add_heads(self, found: HeadsFacts) -> FeatureModel:
        """Adds the heads of a masked stage with new weights, and what else its trunk has; returns itself."""
        plans = {name: HeadPlan(one.spatial, one.summary, HeadSettings.model_validate(one.head)) for name, one in
                 found.teachers.items()}
        width: int = self.network.num_features
        made: Heads = build_heads(width, width, plans, HeadSettings())
        self.heads, self.summary_heads, self._cells = made.spatial, made.summary, made.cells  # type: ignore[assignment]
        if found.position_grid is not None:
            table = self.network.pos_embed
            prefix = table.shape[1] - self.network.patch_embed.num_patches
            self.network.pos_embed = nn.Parameter(table.new_zeros(1, prefix + found.position_grid**2, table.shape[2]))
            read_cropped(self.network, found.position_grid)
        if found.global_blocks is not None:
            add_windows(self.network, found.global_blocks)
            self.has_windows = True
        self._class_tokens = {name: one.class_token for name, one in found.teachers.items()
                              if one.summary or one.class_token >= 0}
        self.adaptors = tuple(plans)
        return self

    def fill_heads(self, found: HeadsFacts, weights: dict[str, Tensor]) -> None:
        """Fills the heads, and the whole table of positions, from the tensors of a masked stage's file. Raises UserError for
        tensors that do not fit."""
        places: dict[str, Tensor] = {}
        for part, module in (("head", self.heads), ("summary_head", self.summary_heads)):
            for key, value in module.state_dict(keep_vars=True).items():
                places[f"{part}.{key.partition('.')[2] if found.single else key}"] = value
        if found.position_grid is not None:
            places[POSITION_TABLE] = self.network.pos_embed
        if wrong := [name for name in sorted(places) if name not in weights or weights[name].shape != places[name].shape]:
            raise UserError(f"{self.folder / HEAD}: {few(wrong)} are missing or have another shape than {HEADS_CONFIG} says")
        with torch.no_grad():
            for name, place in places.items():
                place.copy_(weights[name])

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        """Returns the nearest height and width in pixels that the network takes."""
        if self.patch is None:
            return self.image_size, self.image_size
        rows, columns = self.patch
        return max(1, round(height / rows)) * rows, max(1, round(width / columns)) * columns

    def forward(self, images: Tensor, adaptors: Sequence[str] = ()) -> Output | dict[str, Output]:
        """Returns summary and patches of [B, channels, H, W] images from 0 to 1. With `adaptors` a dict: those of the network
        under "backbone", and under each name what that teacher would say; of a teacher without a summary, or without patches,
        these have width 0. Raises UserError for another size, and for an adaptor that is not there."""
        size = images.shape[-2], images.shape[-1]
        if size != self.nearest_size(*size):
            near = self.nearest_size(*size)
            raise UserError(f"{self.folder}: images of {size[0]} x {size[1]} px; the nearest size that it takes is {near[0]} x "
                            f"{near[1]}")
        if unknown := [name for name in adaptors if name not in self.adaptors]:
            raise UserError(f"{self.folder}: no adaptor {', '.join(unknown)}; it has {', '.join(self.adaptors) or 'none'}")
        if self.window is not None and not (self.has_windows and sides_of(self.grid_of(images), (self.window,))):
            why = "windows do not divide the grid" if self.has_windows else "it was trained without windows"
            raise UserError(f"{self.folder}: window={self.window}, images of {size[0]} x {size[1]} px: {why}")
        mean, std = self._pixels  # type: ignore[misc]  # a buffer is a tensor
        pixels = (images - mean) / std
        if not self.adaptors:
            features = self._reading.features(pixels)
            return Output(features.summary, features.spatial)
        found = self.encode(pixels, adaptors)
        own = found.pop(BACKBONE)
        return own if not adaptors else {BACKBONE: own} | found

    def encode(self, pixels: Tensor, adaptors: Sequence[str]) -> dict[str, Output]:
        """Returns features of normalised pixels by adaptor, and the trunk's own as "backbone"."""
        grid = self.grid_of(pixels)
        with windowed(grid, self.window):
            tokens: Tensor = self.network.forward_features(pixels)
        if tokens.ndim == 4:
            tokens = tokens_and_grid(tokens, self.network)[0]
        prefix = facts.prefix_tokens(self.network)
        patches = tokens[:, prefix:]
        count = max(self._class_tokens.values(), default=0) + 1
        own = tokens[:, :count].flatten(1) if getattr(self.network, "cls_token", None) is not None else patches.mean(1)
        found = {BACKBONE: Output(own, patches)}
        none = torch.empty(0, dtype=torch.int64, device=pixels.device)  # all patches, by their grid
        chosen: dict[str, Grid | None] = dict.fromkeys(adaptors, grid)
        spatial = predict(self.heads, self._cells, Patches(tokens, prefix, grid, none), chosen)
        assert isinstance(spatial, dict)
        for name in adaptors:
            summary, rows = patches[:, 0, :0], patches[:, :, :0]
            if name in self.summary_heads:
                place = self._class_tokens[name]
                summary = self.summary_heads[name](patches.mean(1) if place < 0 else tokens[:, place])
            if name in spatial:
                count = self._cells[name]
                rows = in_rows(spatial[name].reshape(patches.shape[0], patches.shape[1] * count, -1), grid, count)
            found[name] = Output(summary, rows)
        return found

    def grid_of(self, pixels: Tensor, adaptor: str | None = None) -> Grid:
        """Returns the grid of patches of images, or of the cells that an adaptor predicts."""
        fine = round(self._cells.get(adaptor or "", 1) ** 0.5)
        if self.patch is None:  # it takes one size alone
            assert self.grid is not None
            return self.grid[0] * fine, self.grid[1] * fine
        return pixels.shape[-2] // self.patch[0] * fine, pixels.shape[-1] // self.patch[1] * fine


def in_rows(cells: Tensor, grid: Grid, count: int) -> Tensor:
    """Returns features [B, N * count, C] row by row of the finer grid, from such with the cells of a patch together."""
    if count == 1:
        return cells
    side = round(count**0.5)
    apart = cells.unflatten(1, (*grid, side, side))  # type: ignore[no-untyped-call]
    found: Tensor = apart.transpose(2, 3).flatten(1, 4)
    return found


def load(folder: str | Path) -> FeatureModel:
    """Returns the network in the folder of a finished stage, in eval mode. Raises UserError for a folder without one."""
    folder = Path(folder)
    if (folder / CLIP_CONFIG).is_file():
        from eva_mim.teachers.open_clip import stage_teacher

        return _of_teacher(stage_teacher(TeacherSettings(kind="stage", name=str(folder))), folder)
    if not (folder / TIMM_CONFIG).is_file():
        raise UserError(f"{folder} has no {TIMM_CONFIG}; it must be the folder of a finished stage")
    meta = torch.empty(0).is_meta  # which has no values
    made = _features(f"local-dir:{folder}", folder, pretrained=not meta)
    if not (folder / HEADS_CONFIG).is_file():
        return made
    try:
        found = HeadsFacts.model_validate(read_json(folder / HEADS_CONFIG))
    except ValidationError as error:
        raise UserError(f"{folder / HEADS_CONFIG}: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}") from None
    made.add_heads(found)
    if not meta:
        made.fill_heads(found, dict(open_checkpoint(folder / HEAD)))
    return made.eval()


def described(timm_config: Mapping[str, Any], heads: HeadsFacts | None) -> FeatureModel:
    """Returns the network that a stage's config.json and heads.json describe, with new weights. Raises UserError."""
    try:
        name, options = timm_config["architecture"], dict(timm_config.get("model_args") or {})
    except KeyError:
        raise UserError(f"{TIMM_CONFIG}: it names no architecture of timm") from None
    made = _features(name, Path(TIMM_CONFIG), pretrained_cfg=dict(timm_config.get("pretrained_cfg") or {}), **options)
    return made if heads is None else made.add_heads(heads)


def _features(name: str, folder: Path, **options: Any) -> FeatureModel:
    options["num_classes"] = 0
    try:
        trunk = create(name, **options)
        if any_size := isinstance(trunk, (VisionTransformer, Eva)):
            trunk = create(name, **options, dynamic_img_size=True)
    except (RuntimeError, OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder}: timm cannot open it: {error}") from None
    mean, std = facts.mean_std(trunk)
    return FeatureModel(
        trunk.eval(), read_trunk(trunk, TeacherSettings(kind="timm", name=str(folder))),
        image_size=facts.input_size(trunk)[0], patch=facts.patch_size(trunk) if any_size else None,
        grid=final_grid(trunk, facts.input_size(trunk)[0], len(mean)), mean=mean, std=std, folder=folder,
    ).eval()


def _of_teacher(teacher: FrozenTeacher, folder: Path) -> FeatureModel:
    return FeatureModel(teacher.network, teacher.reading, image_size=teacher.image_size, patch=None, grid=teacher.grid,
                        mean=teacher.mean, std=teacher.std, folder=folder).eval()


def stage_teacher(settings: TeacherSettings) -> FrozenTeacher:
    """Returns the network of a finished stage as a teacher: the image tower of a clip stage, the trunk of another one, or with
    `adaptor` what a masked stage predicts of one of its own teachers. Raises UserError."""
    folder = Path(settings.name)
    if (folder / CLIP_CONFIG).is_file() or not (folder / TIMM_CONFIG).is_file():
        from eva_mim.teachers.open_clip import stage_teacher as tower

        if settings.adaptor is not None:
            raise UserError(f"{settings.path}.adaptor={settings.adaptor}: {folder} is no finished masked stage")
        return tower(settings)
    model = load(folder)
    size = settings.side or model.image_size
    if settings.adaptor is None:
        return FrozenTeacher(model.network, read_trunk(model.network, settings), settings, image_size=size, mean=model.mean,
                             std=model.std)
    if settings.adaptor not in model.adaptors:
        raise UserError(f"{settings.path}.adaptor={settings.adaptor}: {folder} has {', '.join(model.adaptors) or 'none'}")
    if settings.layer != -1 or settings.project or not settings.final_norm or settings.summary:
        raise UserError(f"{settings.path}.adaptor={settings.adaptor} is read as it was trained; leave out layer, final_norm, "
                        "project and summary")
    name = settings.adaptor

    def features(pixels: Tensor) -> Features:
        found = model.encode(pixels, [name])[name]
        return Features(found.summary, found.spatial, model.grid_of(pixels, name))

    return FrozenTeacher(model, Reading(features, summary=f"summary of {name}"), settings, image_size=size, mean=model.mean,
                         std=model.std)
