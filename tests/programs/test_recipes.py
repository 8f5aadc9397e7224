"""Masked-pretraining recipes against what is published of the original runs: schedules, sizes, settings, teachers that fit.

That all recipes and pipelines parse is tested in `test_config.py`.
"""

from __future__ import annotations

from functools import cache
from math import cos, pi
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import pytest
import torch
from torch import nn

from eva_mim.core.errors import UserError
from eva_mim.core.recipe_files import read_yaml
from eva_mim.core.settings import parse
from eva_mim.data import DataSettings
from eva_mim.data.sampler import GlobalOrder
from eva_mim.data.splits import open_splits
from eva_mim.optim.schedule import lr_at, rates_at
from eva_mim.teachers import TeacherSettings
from eva_mim.teachers.open_clip import read_tower
from eva_mim.trunks.meta import meta_device
from pretrain.mim import STAGE
from pretrain.mim_recipe import StageRecipe
from tests.conftest import REPOSITORY, make_folder

IN_21K = 14_197_122
MERGED_30M = 7242 * 4096, 7243 * 4096 - 1
"""The log's 7242 steps of 4096 leave this much room."""
MERGED_38M = 38_000_000
"""Only the name tells; it gives the 2.1 B samples that are published for 56 epochs."""


class Published(NamedTuple):
    """Section 4.1 of facts/eva.md, and counts of section 1."""

    images: tuple[int, ...]
    gpus: int | None
    per_gpu: int
    epochs: int
    steps_per_epoch: int
    billions_seen: float
    lr: float
    warmup_steps: int
    drop_path: float
    zero_stage: int | None
    parameters: int
    """That train, with the head and the mask token."""
    teacher: tuple[str, str] = ("EVA01-g-14", "laion400m_s11b_b41k")
    masked: int = 105
    adam: tuple[float, float, float] = (0.9, 0.98, 1e-6)
    clip: float | None = 3.0
    patch_grad_scale: float = 0.1


PUBLISHED = {
    "eva01_g": Published(MERGED_30M, 128, 32, 150, 7242, 4.45, 1e-3, 14484, 0.1, 1, 1_012_229_632,
                         ("ViT-L-14-quickgelu", "openai"), patch_grad_scale=1.0),
    "eva_l": Published((IN_21K,), None, 64, 150, 3466, 2.13, 2.4e-3, 6932, 0.0, None, 316_576_768,
                       masked=192, adam=(0.9, 0.95, 1e-8), clip=None, patch_grad_scale=1.0),
    "eva02_ti": Published((IN_21K,), 40, 100, 240, 3549, 3.4, 3e-3, 3549, 0.0, 0, 5_699_968),
    "eva02_s": Published((IN_21K,), 40, 100, 240, 3549, 3.4, 3e-3, 3549, 0.0, 0, 22_015_744),
    "eva02_b": Published((IN_21K,), 32, 64, 150, 6932, 2.1, 1.5e-3, 6932, 0.0, 0, 86_546_944),
    "eva02_l": Published((IN_21K,), 64, 32, 150, 6932, 2.1, 1.5e-3, 6932, 0.1, 1, 304_319_424),
    "eva02_l_m38m": Published((MERGED_38M,), 64, 32, 56, 18554, 2.1, 1.5e-3, 18554, 0.1, 1, 304_319_424),
}  # fmt: skip


def read(name: str) -> StageRecipe:
    path = REPOSITORY / "configs" / "mim" / f"{name}.yaml"
    return parse(StageRecipe, read_yaml(path), str(path))


NAMES = sorted(path.stem for path in (REPOSITORY / "configs" / "mim").glob("*.yaml"))
WITH_OPEN_CLIP = [name for name in NAMES if (alone := read(name).teacher) is not None and alone.kind == "open_clip"]


@cache
def teacher_map(name: str, image_size: int | None) -> tuple[tuple[int, int], tuple[int, ...]]:
    """(grid, shape of the patch features of one image) of a tower without memory."""
    options: dict[str, Any] = {} if image_size is None else {"force_image_size": image_size}
    with meta_device(), torch.no_grad():
        visual = open_clip.create_model(name, device="meta", **options).visual
        size = visual.image_size[0] if isinstance(visual.image_size, tuple) else visual.image_size
        features = read_tower(visual, TeacherSettings(name=name)).features(torch.zeros(1, 3, size, size))
    return features.grid, tuple(features.spatial.shape)


@cache
def student_of(name: str) -> Any:
    return STAGE.on_meta(read(name)).student


def test_no_published_recipe_is_missing() -> None:
    assert PUBLISHED.keys() <= set(WITH_OPEN_CLIP)
    assert {name for name in NAMES if name.startswith("eva")} == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_schedule_of_a_published_run(name: str) -> None:
    recipe, run = read(name), PUBLISHED[name]
    for images in run.images:
        order = GlobalOrder(images, seed=0, global_batch=recipe.run.global_batch, micro_batch=run.per_gpu)
        assert order.steps_per_epoch == run.steps_per_epoch
    assert recipe.data.expected == (IN_21K if run.images == (IN_21K,) else None)
    assert recipe.run.epochs == run.epochs
    seen = run.steps_per_epoch * run.epochs * recipe.run.global_batch
    assert seen / 1e9 == pytest.approx(run.billions_seen, rel=0.015)
    lengths = {"steps_per_epoch": run.steps_per_epoch, "epochs": recipe.run.epochs}
    peak, first, total = run.lr, run.warmup_steps, run.steps_per_epoch * run.epochs
    wanted = {
        0: 0.0,
        1: peak / (first - 1),
        first - 1: peak,
        first: peak,
        total - 1: 1e-5 + (peak - 1e-5) / 2 * (1 + cos(pi * (1 - 1 / (total - first)))),
    }
    for step, lr in wanted.items():
        assert lr_at(step, recipe.optim, **lengths) == pytest.approx(lr, rel=1e-12), step
    assert lr_at(first + 1, recipe.optim, **lengths) < peak
    assert {rates_at(step, recipe.optim, **lengths).weight_decay for step in (0, first, total - 1)} == {0.05}


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_of_a_published_run(name: str) -> None:
    recipe, run = read(name), PUBLISHED[name]
    assert recipe.run.micro_batch == run.per_gpu
    if run.gpus is not None:
        assert recipe.run.global_batch == run.gpus * run.per_gpu
        assert recipe.run.zero_stage == run.zero_stage
    assert (recipe.run.engine, recipe.run.precision) == ("deepspeed", "fp16")
    assert recipe.run.seed == (88 if name.startswith("eva02") else 0)
    assert (*recipe.optim.betas, recipe.optim.eps) == run.adam
    assert recipe.optim.clip_grad == run.clip
    assert recipe.optim.layer_decay == 1.0
    assert (recipe.student.drop_path, recipe.student.patch_grad_scale) == (run.drop_path, run.patch_grad_scale)
    assert recipe.mask.masked_patches(256) == run.masked
    assert recipe.mask.kind == ("random" if name == "eva_l" else "block")
    assert (recipe.view.crop_scale, recipe.view.crop_ratio, recipe.view.flip) == ((0.2, 1.0), (3 / 4, 4 / 3), 0.5)
    assert (recipe.teacher.name, recipe.teacher.weights) == run.teacher
    assert recipe.objective.kind == "cosine"
    law, std = {"eva01_g": ("eva01", 0.015), "eva_l": ("mae", 0.02)}.get(name, ("eva02", 0.02))
    assert (recipe.student.init.law, recipe.student.init.std) == (law, std)


@pytest.mark.parametrize("name", PUBLISHED)
def test_student_of_a_published_run(name: str) -> None:
    student = student_of(name)
    trained = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
    assert trained == PUBLISHED[name].parameters
    assert (student.image_size, student.grid) == (224, (16, 16))
    assert student.mean == (0.48145466, 0.4578275, 0.40821073)  # CLIP's, as EVA-01/eva/datasets.py
    assert student.std == (0.26862954, 0.26130258, 0.27577711)
    norms = [module.eps for module in student.trunk.modules() if isinstance(module, nn.LayerNorm)]
    assert norms
    assert set(norms) == {1e-6}


@pytest.mark.parametrize("name", WITH_OPEN_CLIP)
def test_student_and_teacher_fit(name: str) -> None:
    recipe, student = read(name), student_of(name)
    grid, (_, patches, width) = teacher_map(recipe.teacher.name, recipe.teacher.image_size)
    assert student.grid == grid
    assert grid[0] * grid[1] == patches
    assert student.head.out_features == width


@pytest.mark.parametrize("name", sorted({read(name).teacher.name for name in WITH_OPEN_CLIP}))
def test_teachers_weights_are_known_and_meet_their_activation(name: str) -> None:
    tags = {recipe.teacher.weights for recipe in map(read, WITH_OPEN_CLIP) if recipe.teacher.name == name}
    for tag in tags - {None}:
        known = open_clip.get_pretrained_cfg(name, tag)
        assert known, f"{name} has no weights {tag}"
        assert known.get("quick_gelu", False) == open_clip.get_model_config(name).get("quick_gelu", False)


def test_another_number_of_images_is_refused(tmp_path: Path) -> None:
    make_folder(tmp_path, {"train/a": 6, "train/b": 4, "val/a": 3})
    data = DataSettings(root=tmp_path, train="train", val="val", expected=10, limit=4)
    assert len(open_splits(data).train) == 4  # a limit is the user's own
    for settings, found in (({"expected": 12, "val": "val"}, 10), ({"expected": 10, "val_share": 0.2}, 8)):
        with pytest.raises(UserError, match=rf"data\.expected: .* {settings['expected']} .* has {found} .*data\.expected=null"):
            open_splits(DataSettings(root=tmp_path, train="train", **settings))
    assert len(open_splits(DataSettings(root=tmp_path, train="train", val_share=0.2)).train) == 8
