"""Recipes of classification stages against what is published of the original runs: schedules, sizes, settings, parents.

That all recipes parse is tested in `test_config.py`. Numbers are typed in from tables 4.2 and 4.3 of facts/eva.md, and from the
logs in EVA-01/logs/cls of github.com/baaivision/EVA, commit 5623d08.
"""

from __future__ import annotations

from functools import cache
from math import cos, fsum, pi
from pathlib import Path
from typing import NamedTuple

import open_clip
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eva_mim.core.recipe_files import read_yaml
from eva_mim.core.settings import parse
from eva_mim.data.class_lists import layout_classes, positions
from eva_mim.data.sampler import GlobalOrder
from eva_mim.optim.groups import parameter_groups
from eva_mim.optim.schedule import lr_at, rates_at
from eva_mim.students.classifier import Classifier
from eva_mim.students.masked import MaskedStudent
from eva_mim.trunks.meta import meta_device
from eva_mim.weights.handover import read_parent, seed_trunk
from finetune.classify import STAGE, StageRecipe
from finetune.probe import StageRecipe as ProbeRecipe
from tests.conftest import REPOSITORY
from tests.optim.test_optimizers import G_1K, G_21K, L_1K, L_21K
from tests.programs.test_recipes import read as read_masked
from tests.programs.test_recipes import student_of
from tests.weights.test_handover import write_stage

CONFIGS = REPOSITORY / "configs"
IN_1K, IN_21K, CLASSES_21K = 1_281_167, 14_197_122, 21_841
SPARE = IN_21K - 3466 * 4096
"""Images that the published 3466 (6932, 13864) steps of an epoch leave over."""


class Trunk(NamedTuple):
    """Section 1 of facts/eva.md: parameters at 224 px with one norm and without a head, and what `at` needs."""

    parameters: int
    width: int
    depth: int
    frozen: bool
    """The patch convolution: `stop_grad_conv1`, which MAEVisionTransformer (EVA-L) does not have."""

    def at(self, pixels: int, classes: int) -> int:
        """Parameters of a classifier."""
        return self.parameters + ((pixels // 14) ** 2 - 256) * self.width + (self.width + 1) * classes


TRUNKS = {
    "eva01_g": Trunk(1_011_146_112, 1408, 40, True),  # 1,012,229,632 less mask token and head of the masked student
    "eva01_clip_g": Trunk(1_011_146_112, 1408, 40, True),
    "eva_l": Trunk(303_178_752, 1024, 24, False),  # 304,531,432 at 336 px less its head, and with 256 positions
    "eva02_ti": Trunk(5_502_144, 192, 12, True),
    "eva02_s": Trunk(21_621_120, 384, 12, True),
    "eva02_b": Trunk(85_758_720, 768, 12, True),
    "eva02_l": Trunk(303_268_800, 1024, 24, True),
    "eva02_l_m38m": Trunk(303_268_800, 1024, 24, True),
}
LOGGED_PARAMETERS = {
    "eva01_g_in21k_224": 1_041_920_081, "eva01_clip_g_in1k_224": 1_012_555_112, "eva01_clip_g_in1k_336": 1_013_005_672,
    "eva01_g_in1k_336_from_in21k": 1_013_005_672, "eva01_g_in1k_560_from_in21k": 1_014_447_464, "eva_l_in21k_224": 325_565_777,
    "eva_l_in1k_196": 304_142_312, "eva_l_in1k_336": 304_531_432, "eva_l_in1k_196_from_in21k": 304_142_312,
    "eva_l_in1k_336_from_in21k": 304_531_432,
}  # fmt: skip


class Published(NamedTuple):
    """A row of table 4.2 or 4.3; None where it has a question mark."""

    parent: str
    pixels: int
    gpus: int | None
    batch: int
    accumulated: int
    epochs: int
    warmup: int
    lr: float
    layer_decay: float
    drop_path: float | None
    smoothing: float | None
    zero_stage: int | None
    figure: str
    """In the header."""
    crop: float | None = 0.08
    average: bool = True
    min_lr: float = 0.0
    cutmix: float | None = 0.0
    adam: tuple[float, float, float] | None = (0.9, 0.999, 1e-8)


ROWS_21K = {
    "eva01_g_in21k_224": Published("eva01_g", 224, 64, 4096, 1, 60, 15, 1e-4, 0.85, 0.4, 0.1, 1, "3.998", 0.5, False, 1e-6, 1.0,
                                   (0.9, 0.98, 1e-6)),
    "eva_l_in21k_224": Published("eva_l", 224, None, 4096, 1, 90, 15, 6e-4, 0.75, None, None, None, "4.206", None, False, 1e-6,
                                 None, None),
    "eva02_b_in21k_448": Published("eva02_b", 448, 32, 2048, 1, 40, 1, 3e-4, 0.7, 0.1, 0.1, 1, "88.570 %", 0.2, False),
    "eva02_l_in21k_448": Published("eva02_l", 448, 64, 1024, 1, 20, 1, 2e-4, 0.75, 0.15, 0.1, 1, "89.904 %", 0.2, False),
    "eva02_l_m38m_in21k_448": Published("eva02_l_m38m", 448, 64, 2048, 2, 30, 1, 3e-4, 0.75, 0.15, 0.1, 1, "89.974 %", 0.2,
                                        False),
}  # fmt: skip
ROWS_1K = {
    "eva01_g_in1k_336_from_in21k": Published("eva01_g_in21k_224", 336, 32, 512, 1, 10, 2, 3e-5, 0.95, 0.4, 0.3, 1, "89.622 %"),
    "eva01_g_in1k_560_from_in21k": Published("eva01_g_in21k_224", 560, 32, 512, 1, 15, 2, 3e-5, 0.95, 0.4, 0.3, 1, "89.712 %"),
    "eva01_clip_g_in1k_224": Published("eva01_g_clip", 224, 32, 512, 1, 20, 2, 3e-5, 0.9, 0.4, 0.3, 1, "89.074 %"),
    "eva01_clip_g_in1k_336": Published("eva01_g_clip", 336, 32, 512, 1, 20, 2, 3e-5, 0.9, 0.4, 0.3, 1, "89.378 %"),
    "eva_l_in1k_196": Published("eva_l", 196, None, 1024, 1, 50, 5, 2e-4, 0.8, None, None, None, "88.016 %", cutmix=None),
    "eva_l_in1k_336": Published("eva_l", 336, None, 1024, 1, 50, 5, 2e-4, 0.8, None, None, None, "88.652 %", cutmix=None),
    "eva_l_in1k_196_from_in21k": Published("eva_l_in21k_224", 196, None, 512, 1, 20, 5, 6e-5, 0.8, None, None, None, "88.586 %"),
    "eva_l_in1k_336_from_in21k": Published("eva_l_in21k_224", 336, None, 512, 1, 20, 5, 6e-5, 0.8, None, None, None, "89.168 %"),
    "eva02_ti_in1k_336": Published("eva02_ti", 336, 8, 1024, 1, 100, 5, 2e-4, 0.9, 0.1, 0.1, 0, "80.714 %"),
    "eva02_s_in1k_336": Published("eva02_s", 336, 8, 1024, 1, 100, 5, 1e-4, 0.8, 0.1, 0.1, 0, "85.780 %"),
    "eva02_b_in1k_448": Published("eva02_b", 448, 32, 1024, 1, 30, 3, 1e-4, 0.7, 0.1, 0.1, 0, "88.282 %"),
    "eva02_l_in1k_448": Published("eva02_l", 448, 32, 1024, 2, 30, 3, 5e-5, 0.8, 0.15, 0.2, 1, "89.626 %"),
    "eva02_l_m38m_in1k_448": Published("eva02_l_m38m", 448, 32, 1024, 2, 30, 3, 7e-5, 0.8, 0.15, 0.2, 1, "89.570 %"),
    "eva02_b_in1k_448_from_in21k": Published("eva02_b_in21k_448", 448, 8, 512, 1, 15, 2, 5e-5, 0.8, 0.15, 0.2, 1, "88.570 %"),
    "eva02_l_in1k_448_from_in21k": Published("eva02_l_in21k_448", 448, 32, 512, 1, 20, 2, 2e-5, 0.85, 0.15, 0.2, 1, "89.904 %"),
    "eva02_l_m38m_in1k_448_from_in21k": Published("eva02_l_m38m_in21k_448", 448, 32, 512, 1, 20, 2, 2e-5, 0.85, 0.15, 0.2, 1,
                                                  "89.974 %"),
}  # fmt: skip
PUBLISHED = ROWS_21K | ROWS_1K
LOGS = {  # not yet in test_optim.py: recipe, steps of an epoch, {epoch: mean learning rate}
    "classify/eva01_g_in1k_560_from_in21k": (2502, {7: 1.8581707953548876e-5, 14: 1.4566145344469748e-7}),
    "classify/eva01_clip_g_in1k_224": (2502, {0: 7.498500899460321e-6, 9: 1.8877864713667382e-5, 19: 7.608399568101435e-8}),
    "classify/eva01_clip_g_in1k_336": (2502, {0: 7.498500899460321e-6, 9: 1.8877864713667382e-5, 19: 7.608399568101435e-8}),
    "classify/eva_l_in1k_336": (1251, {0: 1.9987208186760478e-5, 24: 1.2078967586445874e-4, 49: 8.130890469494856e-8}),
    "classify/eva_l_in1k_196_from_in21k": (2502, {0: 5.998081381405388e-6, 9: 4.760236026498345e-5, 19: 2.1897503876185787e-7}),
    "classify/eva_l_in1k_336_from_in21k": (2502, {0: 5.998081381405388e-6, 9: 4.760236026498345e-5, 19: 2.1897503876185787e-7}),
}  # fmt: skip


def read(name: str) -> StageRecipe:
    """The recipe PROGRAM/NAME."""
    path = CONFIGS / f"{name}.yaml"
    model: type[StageRecipe] = ProbeRecipe if name.startswith("probe/") else StageRecipe
    return parse(model, read_yaml(path), str(path))


def header(name: str) -> str:
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    return " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))


def classes_of(name: str) -> int:
    """In the head."""
    return CLASSES_21K if "_in21k_" in name else 10_450 if name.startswith("vit_b16_in21kp") else 1000


@cache
def classifier(name: str) -> Classifier:
    student: Classifier = STAGE.on_meta(read(f"classify/{name}"), classes_of(name)).student
    return student


def trunk_facts(name: str) -> Trunk:
    return TRUNKS[name.partition("_in1k_")[0].partition("_in21k_")[0]]


def test_every_published_row_has_its_recipe_and_its_figure() -> None:
    assert {path.stem for path in (CONFIGS / "classify").glob("eva*.yaml")} == PUBLISHED.keys()
    assert (len(ROWS_21K), len(ROWS_1K)) == (5, 16)
    for name, run in PUBLISHED.items():
        assert run.figure in header(f"classify/{name}"), name


@pytest.mark.parametrize("name", PUBLISHED)
def test_schedule_of_a_published_run(name: str) -> None:
    recipe, run = read(f"classify/{name}"), PUBLISHED[name]
    images, data = (IN_21K if name in ROWS_21K else IN_1K), recipe.data
    held = 0 if data.val else round(data.val_share * images)
    assert (data.expected, held) == (images - held, 284 if name in ROWS_21K else 0)
    assert held <= SPARE
    micro = recipe.run.micro_batch or 0
    steps = GlobalOrder(images - held, seed=0, global_batch=run.batch, micro_batch=micro).steps_per_epoch
    assert steps == images // run.batch == {4096: 3466, 2048: 6932}.get(run.batch, images // run.batch)
    assert (recipe.run.global_batch, recipe.run.epochs) == (run.batch, run.epochs)
    assert f"{steps} steps an epoch" in header(f"classify/{name}")
    assert f"Steps: {steps * run.epochs:,};" in header(f"classify/{name}")
    lengths = {"steps_per_epoch": steps, "epochs": run.epochs}
    first, total = run.warmup * steps, run.epochs * steps
    last = run.min_lr + (run.lr - run.min_lr) / 2 * (1 + cos(pi * (1 - 1 / (total - first))))
    for step, lr in {0: 0.0, 1: run.lr / (first - 1), first - 1: run.lr, first: run.lr, total - 1: last}.items():
        assert lr_at(step, recipe.optim, **lengths) == pytest.approx(lr, rel=1e-9 if step == total - 1 else 1e-12), step
    assert {rates_at(step, recipe.optim, **lengths).weight_decay for step in (0, first, total - 1)} == {0.05}


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_of_a_published_run(name: str) -> None:
    recipe, run = read(f"classify/{name}"), PUBLISHED[name]
    if run.gpus is not None:
        assert recipe.run.micro_batch == run.batch // (run.gpus * run.accumulated)
    ours = (recipe.run.zero_stage, recipe.student.drop_path, recipe.mix.smoothing, recipe.view.crop_scale[0], recipe.mix.cutmix,
            (*recipe.optim.betas, recipe.optim.eps))  # fmt: skip
    theirs = (run.zero_stage, run.drop_path, run.smoothing, run.crop, run.cutmix, run.adam)
    assert theirs == tuple(value if known is not None else None for value, known in zip(ours, theirs, strict=True))
    assert (recipe.run.engine, recipe.run.precision, recipe.run.seed) == ("deepspeed", "fp16", 0)
    assert (recipe.optim.optimizer, recipe.optim.clip_grad, recipe.optim.layer_decay) == ("adamw", None, run.layer_decay)
    assert recipe.run.ema_decay == (0.9999 if run.average else None)
    assert recipe.run.ema_warmup is not run.average
    assert (recipe.student.global_pool, recipe.student.head_scale, recipe.student.head_rows) == ("avg", 0.001, "new")
    view = recipe.view
    assert (view.crop_scale[1], view.flip, view.randaugment, view.crop_pct) == (1.0, 0.5, "rand-m9-mstd0.5-inc1", 1.0)
    assert (view.erase, view.jitter, view.grayscale) == (0.0, None, 0.0)
    # The logs of these three lack the accuracy in training, which engine_for_finetuning.py leaves out with mixup or cutmix only.
    mixed = name in ("eva_l_in21k_224", "eva_l_in1k_196", "eva_l_in1k_336", "eva01_g_in21k_224")
    assert bool(recipe.mix.mixup or recipe.mix.cutmix) == mixed
    assert recipe.run.evaluate_every == (100 if name in ROWS_21K else 1)  # 21k: after the last epoch alone
    assert recipe.student.grad_checkpointing == name.startswith("eva01")


@pytest.mark.parametrize("name", PUBLISHED)
def test_classifier_of_a_published_run(name: str) -> None:
    recipe, run, facts, student = read(f"classify/{name}"), PUBLISHED[name], trunk_facts(name), classifier(name)
    count = sum(parameter.numel() for parameter in student.parameters())
    assert count == facts.at(run.pixels, classes_of(name)) == LOGGED_PARAMETERS.get(name, count)
    still = sum(parameter.numel() for parameter in student.parameters() if not parameter.requires_grad)
    assert still == (facts.width * (3 * 14 * 14 + 1) if facts.frozen else 0)
    assert student.image_size == run.pixels
    assert student.mean == (0.48145466, 0.4578275, 0.40821073)  # CLIP's, as datasets.py; no command asks for ImageNet's
    assert student.std == (0.26862954, 0.26130258, 0.27577711)
    norms = [module for module in student.modules() if isinstance(module, nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {1e-6}
    assert isinstance(student.trunk.norm, nn.Identity)
    assert student.trunk.fc_norm in norms
    scales = [group["lr_scale"] for group in parameter_groups(student, recipe.optim)]
    assert max(scales) == 1.0
    assert min(scales) == pytest.approx(run.layer_decay ** (facts.depth + 1), rel=1e-12)
    rope = getattr(student.trunk, "rope", None)
    assert (rope is not None) == name.startswith("eva02")
    if rope is not None:  # positions are index / grid * 16: rope.py, intp_freq
        assert tuple(rope.ref_feat_shape) == (16, 16)


def mean_rate(name: str, steps: int, epoch: int) -> float:
    recipe = read(name)
    assert recipe.run.epochs is not None
    at = range(epoch * steps, (epoch + 1) * steps)
    return fsum(lr_at(step, recipe.optim, steps_per_epoch=steps, epochs=recipe.run.epochs) for step in at) / steps


@pytest.mark.parametrize("name", LOGS)
def test_epoch_means_are_those_of_the_original_logs(name: str) -> None:
    steps, rows = LOGS[name]
    for epoch, logged in rows.items():
        assert mean_rate(name, steps, epoch) == pytest.approx(logged, rel=1e-12), epoch


@pytest.mark.parametrize(
    ("name", "made"),
    [("eva01_g_in21k_224", G_21K), ("eva01_g_in1k_336_from_in21k", G_1K), ("eva_l_in1k_196", L_1K), ("eva_l_in21k_224", L_21K)],
)
def test_four_logs_of_the_optimizers_tests_are_of_these_recipes(name: str, made: dict[str, float]) -> None:
    assert read(f"classify/{name}").optim.model_dump(include={*made}) == made


def test_an_unknown_smoothing_agrees_with_its_logs_last_loss() -> None:
    """Of EVA-L after ImageNet-21K: 2.314 and 2.274. No loss is below the entropy of the smoothed label."""

    def least(smoothing: float) -> float:
        wanted = torch.full((1000,), smoothing / 1000, dtype=torch.float64)
        wanted[0] += 1 - smoothing
        return float(-(wanted * wanted.log()).sum())

    assert least(0.3) > 2.6 > 2.314 > 2.274 > least(0.2) + 0.3
    assert least(0.1) < 1.1
    for pixels in (196, 336):
        assert read(f"classify/eva_l_in1k_{pixels}_from_in21k").mix.smoothing == 0.2


Shapes = dict[str, tuple[int, ...]]


def shapes(trunk: nn.Module) -> Shapes:
    return {name: tuple(value.shape) for name, value in trunk.state_dict().items()}


def differing(one: Shapes, other: Shapes) -> set[str]:
    return {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}


@cache
def parent_shapes(stem: str) -> Shapes:
    """Of the trunk that the stage called `stem` leaves."""
    if stem.endswith("_clip"):
        with meta_device():
            return shapes(open_clip.create_model("EVA01-g-14", device="meta").visual.trunk)
    if (CONFIGS / "mim" / f"{stem}.yaml").exists():
        return shapes(student_of(stem).trunk)
    return shapes(classifier(stem).trunk)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_parent_differs_in_head_norm_and_grid_alone(name: str) -> None:
    recipe, run = read(f"classify/{name}"), PUBLISHED[name]
    assert recipe.init_from == f"runs/{run.parent}"
    theirs, ours = parent_shapes(run.parent), shapes(classifier(name).trunk)
    differs = differing(ours, theirs)
    again = run.parent in PUBLISHED  # a classifier's fc_norm is taken over
    resized = theirs["pos_embed"] != ours["pos_embed"]
    norms = set() if again else {"norm.weight", "norm.bias", "fc_norm.weight", "fc_norm.bias"}
    assert differs == {"head.weight", "head.bias"} | norms | ({"pos_embed"} if resized else set())
    assert recipe.hand_over.norm == ("copy" if again else "drop")
    assert recipe.hand_over.positions == ("original" if resized else "timm")


def test_a_224_px_student_seeds_the_336_px_classifier_by_the_originals_rules(tmp_path: Path) -> None:
    """EVA-02 Ti for real: positions bicubic without antialias, a fresh fc_norm, a new small head, all else as it was."""
    torch.manual_seed(0)
    masked, recipe = MaskedStudent(read_masked("eva02_ti").student, 1024), read("classify/eva02_ti_in1k_336")
    with torch.no_grad():
        for parameter in masked.parameters():
            parameter.normal_()
    student = Classifier(recipe.student, 1000)
    folder = write_stage(tmp_path / "mim", masked.trunk, grid=[16, 16])
    report = seed_trunk(student.trunk, read_parent(folder, recipe.hand_over), recipe.hand_over)
    was: dict[str, Tensor] = masked.trunk.state_dict()
    now: dict[str, Tensor] = student.trunk.state_dict()
    table = was["pos_embed"][:, 1:].reshape(1, 16, 16, -1).permute(0, 3, 1, 2)
    wanted = F.interpolate(table, size=(24, 24), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    assert torch.equal(now["pos_embed"], torch.cat([was["pos_embed"][:, :1], wanted], dim=1))
    assert now["fc_norm.weight"].unique().tolist() == [1.0]
    assert now["fc_norm.bias"].unique().tolist() == [0.0]
    assert 0 < now["head.weight"].abs().max() < 1e-3
    assert set(report.new) == {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}
    same = now.keys() - set(report.new) - {"pos_embed"}
    assert set(report.loaded) == same
    assert all(torch.equal(now[name], was[name]) for name in same)
    assert not student.trunk.patch_embed.proj.weight.requires_grad  # type: ignore[union-attr]


# ---- affordable recipes

AFFORDABLE = sorted(path.stem for path in (CONFIGS / "classify").glob("vit_*.yaml"))


@pytest.mark.parametrize("name", AFFORDABLE)
def test_an_affordable_recipe_fits_its_gpus_and_its_parent(name: str) -> None:
    recipe, gpus = read(f"classify/{name}"), int(name.rpartition("_")[2].partition("x")[0])
    assert recipe.run.global_batch % (gpus * (recipe.run.micro_batch or 0)) == 0
    assert recipe.run.engine == ("local" if gpus == 1 else "deepspeed")
    assert "untested estimate" in header(f"classify/{name}")
    differs = differing(shapes(classifier(name).trunk), parent_shapes(str(recipe.init_from).removeprefix("runs/")))
    norms = {"norm.weight", "norm.bias", "fc_norm.weight", "fc_norm.bias"}
    assert {key for key in differs if key not in norms} <= {"head.weight", "head.bias", "pos_embed"}


def test_the_rows_that_a_head_takes_over_from_the_cleaned_21k() -> None:
    assert read("classify/vit_b16_in1k_from_in21kp_8x24gb").student.head_rows == "shared"
    for layout in ("imagenet-21k-p-winter21", "imagenet-21k-p-fall11"):
        found = positions(layout_classes("imagenet-1k"), layout_classes(layout))
        assert sum(place is not None for place in found) == 991
    assert "991 of the 1,000" in header("classify/vit_b16_in1k_from_in21kp_8x24gb")
