"""CLIP recipes against what is published of the original runs, and their students against open_clip's models of that name.

Numbers are from section 4.5 and 5 of facts/eva.md, and 3.2, 3.4 and 3.5 of facts/radio_vitamin.md. All students stand on the meta
device. That all recipes parse is tested in `test_config.py`.
"""

from __future__ import annotations

import re
from functools import cache
from math import cos, pi
from typing import Any, NamedTuple

import open_clip
import pytest
import torch
from open_clip.model import CustomTextCLIP
from torch import nn

from eva_mim.core.recipe_files import read_yaml
from eva_mim.core.settings import parse
from eva_mim.optim.groups import parameter_groups
from eva_mim.optim.schedule import lr_at
from eva_mim.students import ClipSettings
from eva_mim.students.clip import ClipStudent
from eva_mim.trunks.create import build_trunk
from eva_mim.trunks.meta import meta_device
from eva_mim.trunks.pixels import normalise
from pretrain.clip import STAGE, StageRecipe
from pretrain.mim_recipe import StageRecipe as MimRecipe
from tests.conftest import REPOSITORY


class Tower(NamedTuple):
    lr: float
    decay: float
    layers: int


class Published(NamedTuple):
    model: str
    """open_clip's name."""
    batch: tuple[int, int] | int
    """(GPUs, images on each), or images where the GPUs are unknown."""
    samples: float
    steps: int
    image: Tower
    text: Tower
    zero_shot: float
    """ImageNet-1k, top-1 in percent."""
    second: float
    """EVA-CLIP: COCO, text to image, R@5. ViTamin: mean of DataComp's 38 tasks."""
    text_from: tuple[str, str | None]
    drop_path: float = 0.0
    patch_dropout: float = 0.0
    seed: int = 4096
    lr: float = 5e-4
    """Of the logit scale."""
    warmup: int = 2000
    adam: tuple[float, float, float] = (0.9, 0.999, 1e-8)
    weight_decay: float = 0.05
    clip: float | None = 5.0
    precision: str = "fp16"
    optimizer: str = "lamb"
    constant: bool = False
    """Learning rate without warm-up and decay."""
    side: int = 224


def vitamin(name: str, batch: int, layers: int, *figures: float, **more: Any) -> Published:
    peak = more.get("lr", 5e-4)
    text = Tower(peak, 1.0, 12)
    given = {"samples": 1.28e9, "text_from": (name, None), "warmup": 500, "adam": (0.9, 0.98, 1e-6)}
    rest = {"drop_path": 0.1, "seed": 0, "weight_decay": 0.2, "clip": None, "precision": "bf16", "optimizer": "adamw"}
    zero_shot, second, steps = figures
    return Published(name, batch, image=Tower(peak, 1.0, layers), text=text, zero_shot=zero_shot, second=second,
                     steps=int(steps), **(given | rest | more))  # fmt: skip


OPENAI_B, OPENAI_L = ("ViT-B-16-quickgelu", "openai"), ("ViT-L-14-quickgelu", "openai")
OPEN_H = ("ViT-H-14", "laion2b_s32b_b79k")
LTT: dict[str, Any] = {"text_from": ("ViTamin-L", "datacomp1b")}
LONG: dict[str, Any] = {"samples": 12.8e9, "lr": 2e-3, "warmup": 782, "adam": (0.9, 0.95, 1e-6)}
XL: dict[str, Any] = LONG | {"warmup": 4436, "side": 256, "text_from": ("ViTamin-XL-256", None)}
HIGH: dict[str, Any] = {"lr": 1e-5, "warmup": 0, "weight_decay": 0.0, "adam": (0.9, 0.95, 1e-6), "constant": True}
PUBLISHED = {
    "eva01_g": Published("EVA01-g-14", (256, 160), 11e9, 268_555, Tower(4e-4, 0.85, 40), Tower(4e-5, 0.75, 12), 78.5, 68.5,
                         OPENAI_L, drop_path=0.4, seed=0),  # rates, decays, warm-up: no command; those of g+
    "eva01_g_plus": Published("EVA01-g-14-plus", (112, 1024), 11e9, 95_912, Tower(4e-4, 0.85, 40), Tower(4e-5, 0.75, 24),
                              79.3, 74.0, OPEN_H, patch_dropout=0.5),
    "eva02_b": Published("EVA02-B-16", (64, 2048), 8e9, 61_035, Tower(2e-4, 0.75, 12), Tower(2e-5, 0.75, 12), 74.7, 66.9,
                         OPENAI_B),
    "eva02_l": Published("EVA02-L-14", (128, 1024), 4e9, 30_518, Tower(4e-4, 0.85, 24), Tower(4e-5, 0.75, 12), 79.8, 71.2,
                         OPENAI_L),
    "eva02_l_336": Published("EVA02-L-14-336", (128, 480), 2e9, 32_552, Tower(4e-4, 0.75, 24), Tower(4e-5, 0.65, 12), 80.4, 71.7,
                             ("EVA02-L-14", None), side=336),
    "eva02_e": Published("EVA02-E-14", (144, 800), 4e9, 34_722, Tower(4e-4, 0.9, 64), Tower(4e-5, 0.75, 24), 81.9, 74.7, OPEN_H,
                         patch_dropout=0.5),
    "vitamin_s": vitamin("ViTamin-S", 8192, 14, 62.2, 53.2, 156_250),
    "vitamin_b": vitamin("ViTamin-B", 8192, 14, 68.9, 57.7, 156_250),
    "vitamin_l": vitamin("ViTamin-L", 16384, 31, 73.9, 62.0, 78_125),
    "vitamin_l_long": vitamin("ViTamin-L", 90160, 31, 80.8, 66.7, 141_970, **LONG),
    "vitamin_l_336": vitamin("ViTamin-L-336", 90200, 31, 81.6, 67.0, 2217, samples=0.2e9, side=336,
                             text_from=("ViTamin-L", None), **HIGH),
    "vitamin_xl_long": vitamin("ViTamin-XL-256", 90272, 32, 82.1, 67.6, 141_794, **XL),
    "vitamin_xl_384": vitamin("ViTamin-XL-384", 90270, 32, 82.6, 68.1, 5672, samples=512e6, side=384,
                              text_from=("ViTamin-XL-256", None), **HIGH),
    "vitamin_s_ltt": vitamin("ViTamin-S-LTT", 8192, 14, 63.4, 54.6, 156_250, **LTT),
    "vitamin_b_ltt": vitamin("ViTamin-B-LTT", 8192, 14, 70.8, 59.4, 156_250, **LTT),
}  # fmt: skip
START = {  # CLIP recipe -> masked recipes that can seed it
    "eva01_g": ("eva01_g",),
    "eva01_g_plus": ("eva01_g",),
    "eva02_b": ("eva02_b",),
    "eva02_l": ("eva02_l", "eva02_l_m38m"),
    "vit_s16_1x24gb": ("vit_s16_1x24gb", "vit_s16_8x24gb"),
    "vit_s16_8x24gb": ("vit_s16_1x24gb", "vit_s16_8x24gb"),
    "vit_s16_siglip_8x24gb": ("vit_s16_8x24gb",),
    "vit_s16_ltt_1x24gb": ("vit_s16_1x24gb",),
}
FOLDER = REPOSITORY / "configs" / "clip"
DROP_PATH = r"DropPath\(.*?\)"
"""A rate of training, which open_clip's configuration of EVA-CLIP g does not have."""
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem.startswith(("eva", "vit")))


def read(name: str) -> StageRecipe:
    path = FOLDER / f"{name}.yaml"
    return parse(StageRecipe, read_yaml(path), str(path))


@cache
def student_of(name: str) -> ClipStudent:
    student: ClipStudent = STAGE.on_meta(read(name)).student
    return student


@cache
def model_of(name: str) -> Any:
    with meta_device():
        return open_clip.create_model(name, device="meta")


def theirs(name: str) -> str:
    """Our name of a tensor of an EVA tower -> open_clip's. There the trunk's own head is the projection, and its last norm stands
    before the class token is taken; here the projection stands behind the trunk, and that norm may stand behind the pooling."""
    return name.replace("visual.head.proj.", "visual.trunk.head.").replace("visual.trunk.fc_norm.", "visual.trunk.norm.")


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


# ---- published runs


def test_no_published_recipe_is_missing() -> None:
    assert {name for name in NAMES if name.startswith(("eva", "vitamin"))} == PUBLISHED.keys()
    assert START.keys() == {name for name in NAMES if "vitamin" not in name} - {"eva02_l_336", "eva02_e"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_of_a_published_run(name: str) -> None:
    recipe, run = read(name), PUBLISHED[name]
    if isinstance(run.batch, tuple):
        gpus, each = run.batch
        assert (recipe.run.global_batch, recipe.run.micro_batch) == (gpus * each, each)
    else:
        assert recipe.run.global_batch == run.batch
        assert recipe.run.micro_batch is not None
        assert run.batch % recipe.run.micro_batch == 0
    assert recipe.run.samples == run.samples
    assert recipe.run.steps(1) == run.steps
    assert (recipe.run.seed, recipe.run.precision, recipe.run.engine) == (run.seed, run.precision, "deepspeed")
    assert (recipe.optim.optimizer, recipe.optim.clip_grad) == (run.optimizer, run.clip)
    assert (*recipe.optim.betas, recipe.optim.eps) == run.adam
    assert (recipe.student.drop_path, recipe.student.patch_dropout) == (run.drop_path, run.patch_dropout)
    assert recipe.student.grad_checkpointing
    assert (recipe.student.text.init_from, recipe.student.text.weights) == run.text_from
    assert recipe.contrastive.kind == "clip"
    if name in ("vitamin_l_long", "vitamin_xl_long"):
        assert recipe.view.crop_scale == (0.4, 1.0)
        assert (recipe.view.jitter, recipe.view.jitter_prob, recipe.view.grayscale) == ((0.32, 0.32, 0.32, 0.08), 0.8, 0.2)
    else:
        assert recipe.view.crop_scale == (0.9, 1.0)
        assert (recipe.view.jitter, recipe.view.grayscale) == (None, 0.0)
    assert recipe.view.flip == 0.0


@pytest.mark.parametrize("name", PUBLISHED)
def test_header_gives_the_published_figures(name: str) -> None:
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    (result,) = [line for line in lines if line.startswith("# Result: ")]
    what = "COCO text to image R@5" if name.startswith("eva") else "mean of DataComp's 38 tasks"
    assert result.startswith(f"# Result: {PUBLISHED[name].zero_shot} % zero-shot on ImageNet-1k")
    assert f"{what} {PUBLISHED[name].second}" in result


def layer(name: str, layers: int) -> int:
    """EVA-CLIP's rule (facts/eva.md, 3): by words in the name."""
    if any(word in name for word in ("patch_embed", "pos_embed", "cls_token", "positional_embedding", "token_embedding")):
        return 0
    found = re.search(r"blocks\.(\d+)\.", name)
    return layers + 1 if found is None else int(found[1]) + 1


@pytest.mark.parametrize("name", PUBLISHED)
def test_rates_of_a_published_run(name: str) -> None:
    """Learning rate of every tensor at several steps by the closed form of facts/eva.md, 3, "CLIP LR"; and who decays."""
    recipe, run, student = read(name), PUBLISHED[name], student_of(name)
    groups = parameter_groups(student, recipe.optim)
    group_of = {id(parameter): group for group in groups for parameter in group["params"]}
    warmup, total = run.warmup, run.steps
    seen: dict[str, set[float]] = {"visual": set(), "text": set(), "logit_scale": set()}
    for step in (0, 1, max(0, warmup - 1), warmup, total // 2, total - 1):
        risen = 0.5 * (1 + cos(pi * (step - warmup) / (total - warmup)))
        share = 1.0 if run.constant else (step + 1) / warmup if step < warmup else risen
        lr = lr_at(step, recipe.optim, steps_per_epoch=total, epochs=1)
        for full, parameter in student.model.named_parameters():
            part = full.partition(".")[0]
            tower = {"visual": run.image, "text": run.text}.get(part, Tower(run.lr, 1.0, 0))
            scale = tower.decay ** (tower.layers + 1 - layer(full, tower.layers))
            found = group_of[id(parameter)]["lr_scale"]
            assert lr * found == pytest.approx(tower.lr * scale * share, rel=1e-9), (full, step)
            seen[part].add(found)
    for part, tower in (("visual", run.image), ("text", run.text)):
        assert max(seen[part]) == pytest.approx(tower.lr / run.lr)
        assert min(seen[part]) == pytest.approx(tower.lr / run.lr * tower.decay ** (tower.layers + 1))
    for full, parameter in student.model.named_parameters():
        spared = parameter.ndim == 1 or full.endswith((".bias", "pos_embed", "cls_token", "positional_embedding"))
        assert group_of[id(parameter)]["weight_decay"] == (0.0 if spared else run.weight_decay), full


@pytest.mark.parametrize("name", PUBLISHED)
def test_student_is_open_clips_model_of_that_name(name: str) -> None:
    run, student, model = PUBLISHED[name], student_of(name), model_of(PUBLISHED[name].model)
    rename = theirs if name.startswith("eva") else str
    ours = {rename(key): shape for key, shape in shapes(student.model).items()}
    assert ours | {"logit_scale": ()} == shapes(model)  # a vector of one here
    assert str(student.model.text) == str(model.text)  # activation, eps
    assert str(student.trunk.patch_embed) == str(model.visual.trunk.patch_embed)
    for block, other in zip(student.trunk.blocks, model.visual.trunk.blocks, strict=True):  # type: ignore[arg-type]
        assert re.sub(DROP_PATH, "Identity()", str(block)) == re.sub(DROP_PATH, "Identity()", str(other))
    eps = [{m.eps for m in each.modules() if isinstance(m, nn.LayerNorm)} for each in (student.trunk, model.visual.trunk)]
    assert eps[0] == eps[1]
    assert getattr(student.trunk.patch_drop, "prob", 0.0) == run.patch_dropout
    assert student.trunk.global_pool == model.visual.trunk.global_pool
    assert student.image_size == run.side
    assert student.mean == (0.48145466, 0.4578275, 0.40821073)
    assert student.std == (0.26862954, 0.26130258, 0.27577711)


def test_renaming_is_all_that_separates_the_two() -> None:
    """`theirs` with numbers: a tower whose last norm stands behind the pooling, as that of EVA01-g-14."""
    torch.manual_seed(0)
    text = {"width": 8, "layers": 1, "heads": 1}
    settings = {"name": "eva02_tiny_patch14_224", "embed_dim": 12, "pool": "token", "proj_bias": True, "text": text}
    student = ClipStudent(ClipSettings(**settings)).eval()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    vision = student.config["vision_cfg"] | {"timm_proj": None, "timm_proj_bias": False}
    model = CustomTextCLIP(**(student.config | {"vision_cfg": vision})).eval()
    assert any("fc_norm" in name for name in student.model.state_dict())
    given = {theirs(name): value for name, value in student.model.state_dict().items()}
    model.load_state_dict(given | {"logit_scale": given["logit_scale"].reshape(())})
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    with torch.no_grad():
        wanted = model.encode_image(normalise(images, student.mean, student.std), normalize=True)
        torch.testing.assert_close(student.encode_image(images), wanted, atol=1e-6, rtol=0)


# ---- all recipes


@pytest.mark.parametrize("name", NAMES)
def test_zero_shot_accuracy_is_measured_as_published(name: str) -> None:
    data = read(name).data
    assert data.templates == "openai"
    assert data.held_out is not None
    assert (data.held_out.source, data.held_out.class_names) == ("folder", "imagenet")


@pytest.mark.parametrize("name", NAMES)
def test_header_gives_the_size(name: str) -> None:
    """Of the whole model (EVA-CLIP), or of the image tower."""
    found = re.search(r"\(([\d.]+) ([MB]) parameters", (FOLDER / f"{name}.yaml").read_text())
    assert found is not None
    model: Any = student_of(name).model
    count = sum(parameter.numel() for parameter in (model if name.startswith("eva") else model.visual).parameters())
    assert count / {"M": 1e6, "B": 1e9}[found[2]] == pytest.approx(float(found[1]), rel=0.01)


@pytest.mark.parametrize(("name", "start"), [(name, start) for name, starts in START.items() for start in starts])
def test_masked_recipe_seeds_the_image_tower(name: str, start: str) -> None:
    """Only norms inside attention are new; only positions and the patch kernel of B/16 change their size."""
    path = REPOSITORY / "configs" / "mim" / f"{start}.yaml"
    with meta_device():
        parent = build_trunk(parse(MimRecipe, read_yaml(path), str(path)).student)
    given = {key.replace("fc_norm.", "norm."): shape for key, shape in shapes(parent).items() if not key.startswith("head.")}
    wanted = {key.replace("fc_norm.", "norm."): shape for key, shape in shapes(student_of(name).trunk).items()}
    inner = {key for key in wanted if ".attn.norm." in key}
    assert bool(inner) == name.startswith("eva02")
    assert wanted.keys() - given.keys() == inner
    assert given.keys() <= wanted.keys()
    resized = {key for key in given if given[key] != wanted[key]}
    assert resized == ({"pos_embed", "patch_embed.proj.weight"} if name == "eva02_b" else set())
    assert read(name).init_from is not None
    if name == "eva02_b":  # as EVA-CLIP/rei/training/interpolate_patch_14to16.py
        rule = read(name).hand_over
        assert (rule.grid, rule.positions, rule.kernel) == ((16, 16), "original", "bicubic")


def test_larger_images_change_the_positions_alone() -> None:
    small, large = shapes(student_of("eva02_l").model), shapes(student_of("eva02_l_336").model)
    assert {key for key in large if small.get(key) != large[key]} == {"visual.trunk.pos_embed"}
    assert large["visual.trunk.pos_embed"] == (1, 1 + 24 * 24, 1024)
    assert small.keys() == large.keys()
    recipe = read("eva02_l_336")
    assert recipe.student.init == "clip"
    assert recipe.parents().keys() == {"init_from"}
    assert (recipe.hand_over.grid, recipe.hand_over.positions) == ((16, 16), "original")  # interpolate_patch14_224to336.py


@pytest.mark.parametrize("name", NAMES)
def test_text_weights_are_known_and_fit(name: str) -> None:
    student = read(name).student
    if student.text.weights is None:
        return
    source, tag = student.text.init_from, student.text.weights
    assert source is not None
    known, config = open_clip.get_pretrained_cfg(source, tag), open_clip.get_model_config(source)
    assert known, f"{source} has no weights {tag}"
    assert known.get("quick_gelu", False) == config.get("quick_gelu", False)
    if name.startswith("eva"):
        assert student.text.quick_gelu is not True
        assert student.text.projection == "new"
        assert not student_of(name).config["quick_gelu"]
    assert student.lock_text == ("ltt" in name)
    if student.lock_text:  # its projection is kept
        assert student.embed_dim == config["embed_dim"]


# ---- affordable ones


def test_one_gpu_and_eight_make_the_same_run() -> None:
    one, eight = (read(f"vit_s16_{count}x24gb").model_dump() for count in (1, 8))
    assert one["run"].pop("micro_batch") * 16 == eight["run"].pop("micro_batch") * 8 == 4096
    assert (one["run"].pop("engine"), eight["run"].pop("engine")) == ("local", "deepspeed")
    assert (one["student"].pop("grad_checkpointing"), eight["student"].pop("grad_checkpointing")) == (False, True)
    assert one["data"].pop("workers") == eight["data"].pop("workers") + 1
    assert one == eight


@pytest.mark.parametrize(("name", "width", "space"), [("vit_s16_1x24gb", 512, 512), ("vit_s16_siglip_8x24gb", 384, 384)])
def test_sizes_of_the_small_towers(name: str, width: int, space: int) -> None:
    """12 blocks of 12 w^2 + 13 w, embeddings of 49,408 words and 32 positions, norm, projection; the image tower likewise."""
    student = student_of(name)
    text = 12 * (12 * width**2 + 13 * width) + (49_408 + 32) * width + 2 * width + width * space
    image = 12 * (12 * 384**2 + 13 * 384) + 3 * 16 * 16 * 384 + 384 + (1 + 197) * 384 + 2 * 384 + 384 * space
    assert sum(parameter.numel() for parameter in student.model.text.parameters()) == text
    assert sum(parameter.numel() for parameter in student.model.visual.parameters()) == image


def test_sigmoid_starts_as_published() -> None:
    student = student_of("vit_s16_siglip_8x24gb")
    assert student.config["init_logit_bias"] == -10.0
    assert student.config["init_logit_scale"] == pytest.approx(torch.tensor(10.0).log().item(), rel=1e-4)
    groups = parameter_groups(student, read("vit_s16_siglip_8x24gb").optim)
    bias = [group for group in groups if any(parameter is student.model.logit_bias for parameter in group["params"])]
    assert [group["weight_decay"] for group in bias] == [0.0]
