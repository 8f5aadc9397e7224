"""Schedules and parameter groups against what the original code computed and logged."""

from __future__ import annotations

import json
from collections.abc import Iterable
from math import fsum
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.numpy import load_file
from timm.models.beit import Beit
from timm.models.eva import Eva
from torch import nn

from eva_mim.core.contracts import Rates
from eva_mim.core.errors import UserError
from eva_mim.engine.step import set_rates
from eva_mim.optim import OptimSettings, TowerSettings, check_sharding
from eva_mim.optim.groups import parameter_groups
from eva_mim.optim.optimizers import build_optimizer
from eva_mim.optim.schedule import lr_at, rates_at
from eva_mim.students import ClassifierSettings, MaskedSettings
from eva_mim.students.classifier import Classifier
from eva_mim.students.clip import ClipStudent
from eva_mim.students.masked import MaskedStudent
from eva_mim.trunks import Tower
from eva_mim.trunks.meta import meta_device
from tests.students.tiny_towers import clip_settings

EVA = {"warmup": "inclusive"}
G = {"lr": 1e-3, "min_lr": 1e-5, "warmup_epochs": 2}
L = {"lr": 2.4e-3, "min_lr": 1e-5, "warmup_epochs": 2}
G_21K = {"lr": 1e-4, "min_lr": 1e-6, "warmup_epochs": 15}
G_1K = {"lr": 3e-5, "warmup_epochs": 2}
L_1K = {"lr": 2e-4, "warmup_epochs": 5}
L_21K = {"lr": 6e-4, "min_lr": 1e-6, "warmup_epochs": 15}
LOGGED = [  # settings, epochs, steps of an epoch, {epoch: mean learning rate}
    (G, 150, 7242, {0: 2.4998273838293167e-4, 1: 7.500172616170684e-4, 2: 9.999628353093899e-4,
                    10: 9.919555257350812e-4, 75: 5.102542050290582e-4, 149: 1.0037180089047582e-5}),
    (L, 150, 3466, {0: 5.999134324051363e-4, 75: 1.217686301783234e-3, 149: 1.008977824506173e-5}),
    (G_21K, 60, 3466, {0: 3.332435707553521e-6, 30: 7.373456341957966e-5, 59: 1.0402170980308123e-6}),
    (G_1K, 10, 2502, {0: 7.498500899460321e-6, 5: 1.790873480773282e-5, 9: 3.827978328007433e-7}),
    (L_1K, 50, 1251, {0: 1.9987208186760478e-5, 25: 1.1391724653969757e-4, 49: 8.130890469494856e-8}),
    # facts/eva.md says 3466 (14,197,122 images) and finds 2e-6; 3439 fits to the last digit, so the run saw fewer images.
    (L_21K, 90, 3439, {0: 1.9994571960297767e-5, 45: 3.870604407280369e-4, 89: 1.0876141169097618e-6}),
]  # fmt: skip


def schedule(settings: OptimSettings, *, steps_per_epoch: int, epochs: int) -> list[Rates]:
    return [
        rates_at(step, settings, steps_per_epoch=steps_per_epoch, epochs=epochs) for step in range(epochs * steps_per_epoch)
    ]


@pytest.mark.parametrize("name", ["cosine_a", "cosine_b", "cosine_c_warmup_steps", "cosine_d_no_warmup", "linear_a"])
def test_the_learning_rate_is_the_originals(shared: Path, name: str) -> None:
    golden = shared / "golden" / "lr_schedules"
    made: dict[str, Any] = json.loads(golden.with_suffix(".json").read_text())["definitions"][name]
    settings = OptimSettings(
        lr=made["base"], min_lr=made["min"], warmup_epochs=made["warmup_epochs"], warmup_steps=made.get("warmup_steps"),
        warmup="inclusive", schedule={"cos": "cosine", "linear": "linear"}[made["type"]],
    )  # fmt: skip
    ours = [rates.lr for rates in schedule(settings, steps_per_epoch=made["steps_per_epoch"], epochs=made["epochs"])]
    assert ours == pytest.approx(load_file(golden.with_suffix(".safetensors"))[f"out/{name}"].tolist(), rel=1e-12, abs=1e-18)


def test_the_weight_decay_is_the_originals(shared: Path) -> None:
    golden = load_file(shared / "golden" / "lr_schedules.safetensors")["out/weight_decay_a"]
    settings = OptimSettings(lr=1e-3, weight_decay=0.05, weight_decay_end=0.2)
    assert [rates.weight_decay for rates in schedule(settings, steps_per_epoch=20, epochs=5)] == pytest.approx(
        golden.tolist(), rel=1e-12
    )
    constant = schedule(OptimSettings(lr=1e-3, weight_decay=0.07), steps_per_epoch=20, epochs=5)
    assert {rates.weight_decay for rates in constant} == {0.07}


@pytest.mark.parametrize("name", ["clip_cosine_a", "clip_cosine_b_defaults"])
def test_the_linear_warm_up_is_eva_clips(shared: Path, name: str) -> None:
    golden = shared / "golden" / "lr_schedules"
    made: dict[str, Any] = json.loads(golden.with_suffix(".json").read_text())["definitions"][name]
    columns = load_file(golden.with_suffix(".safetensors"))[f"out/{name}"].T
    for (tower, scale), column in zip(made["groups"], columns, strict=True):
        peak = made["args"].get(f"{tower}_lr") or made["args"]["lr"]
        settings = OptimSettings(lr=peak, warmup_steps=made["args"]["warmup"])
        ours = [rates.lr * scale for rates in schedule(settings, steps_per_epoch=made["total_steps"], epochs=1)]
        assert ours == pytest.approx(column.tolist(), rel=1e-12, abs=1e-18)


@pytest.mark.parametrize(("made", "epochs", "steps", "rows"), LOGGED)
def test_epoch_means_are_those_of_the_original_logs(
    made: dict[str, Any], epochs: int, steps: int, rows: dict[int, float]
) -> None:
    settings = OptimSettings(**EVA, **made)
    for epoch, logged in rows.items():
        at = range(epoch * steps, (epoch + 1) * steps)
        mean = fsum(lr_at(step, settings, steps_per_epoch=steps, epochs=epochs) for step in at) / steps
        assert mean == pytest.approx(logged, rel=1e-12), epoch


def test_first_steps_and_peak_of_eva_g() -> None:
    settings = OptimSettings(**EVA, **G)
    first = {step: lr_at(step, settings, steps_per_epoch=7242, epochs=150) for step in (0, 1, 14483, 14484, 14485)}
    assert first[0] == 0.0
    assert first[1] == pytest.approx(1e-3 / 14483, rel=1e-15)
    assert first[14483] == first[14484] == 1e-3
    assert 0.999999e-3 < first[14485] < 1e-3


def test_short_warm_ups_and_steps_past_the_end() -> None:
    inclusive = [lr_at(step, OptimSettings(lr=1.0, warmup_steps=1, **EVA), steps_per_epoch=4, epochs=1) for step in (0, 1)]
    assert inclusive == [0.0, 1.0]
    without = OptimSettings(lr=1.0, warmup_epochs=3, warmup_steps=0)
    assert lr_at(0, without, steps_per_epoch=4, epochs=1) == 1.0
    for kind in ("cosine", "linear"):
        settings = OptimSettings(lr=1.0, min_lr=0.25, warmup_epochs=0, schedule=kind, weight_decay=0.1, weight_decay_end=0.4)
        assert rates_at(9, settings, steps_per_epoch=4, epochs=2)[:2] == pytest.approx((0.25, 0.4))


class Student(nn.Module):
    """A trunk, and around it what EVA's pretraining adds."""

    stem_parameters = ("mask_token",)

    def __init__(self, trunk: nn.Module, pretraining: bool):
        super().__init__()
        self.trunk = trunk
        if pretraining:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, 8))
            self.head = nn.Linear(8, 4)


RENAMED = {  # of timm's EVA blocks -> the original's
    "eva02_b": {"attn.q_proj.bias": "attn.q_bias", "attn.v_proj.bias": "attn.v_bias", "mlp.fc1_g": "mlp.w1",
                "mlp.fc1_x": "mlp.w2", "mlp.fc2": "mlp.w3", "mlp.norm": "mlp.ffn_ln"},
    "eva02_s": {"mlp.fc1": "mlp.w12", "mlp.fc2": "mlp.w3"},
}  # fmt: skip


def original_name(name: str, case: str) -> str:
    if not name.startswith("trunk."):
        return name.replace("head.", "lm_head.")
    for ours, theirs in RENAMED.get(case[:7], {}).items():
        name = name.replace(ours, theirs)
    return name.removeprefix("trunk.")


def original_student(case: str, depth: int) -> Student:
    """A narrow student with the parameters of the original's model of this case."""
    pretraining = "mim" in case
    size: dict[str, Any] = {"img_size": 28, "patch_size": 14, "embed_dim": 8, "num_heads": 2, "depth": depth}
    size |= {"num_classes": 0, "global_pool": ""} if pretraining else {"num_classes": 5, "global_pool": "avg"}
    kinds: dict[str, Any] = {
        "eva01_finetune_relpos_layerscale": lambda: Beit(**size, use_rel_pos_bias=True, use_abs_pos_emb=True, init_values=0.1),
        "eva01_mim_layer_decay": lambda: Beit(**size, use_shared_rel_pos_bias=True, use_abs_pos_emb=True),
        "eva02_b": lambda: Eva(**size, qkv_fused=False, swiglu_mlp=True, scale_mlp=True, use_rot_pos_emb=True),
        "eva02_s": lambda: Eva(**size, swiglu_mlp=True, use_rot_pos_emb=True),
    }
    make = kinds.get(case) or kinds.get(case[:7]) or (lambda: Eva(**size))
    return Student(make(), pretraining)


def by_name(student: nn.Module, groups: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each parameter's group; fails where one stands in two."""
    found: dict[str, dict[str, Any]] = {}
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    for group in groups:
        for parameter in group["params"]:
            assert names[id(parameter)] not in found
            found[names[id(parameter)]] = group
    return found


@pytest.mark.parametrize(
    "case",
    ["eva01_mim", "eva01_mim_layer_decay", "eva01_finetune", "eva01_finetune_relpos_layerscale",
     "eva02_b_finetune", "eva02_s_finetune", "eva02_b_mim"],
)  # fmt: skip
def test_parameter_groups_are_the_originals(shared: Path, case: str) -> None:
    golden = json.loads((shared / "golden" / "param_groups.json").read_text())["cases"][case]
    student = original_student(case, golden["depth"])
    settings = OptimSettings(lr=1.0, layer_decay=golden["layer_decay"], weight_decay=golden["base_weight_decay"])
    groups = parameter_groups(student, settings)
    assert len(groups) == golden["n_groups"]
    found = {original_name(name, case): group for name, group in by_name(student, groups).items()}
    assert found.keys() == golden["parameters"].keys()
    for name, wanted in golden["parameters"].items():
        ours = found[name]
        assert ours["lr_scale"] == pytest.approx(wanted["lr_scale"], rel=1e-12), name
        assert (ours["weight_decay"], ours["decays"]) == (wanted["weight_decay"], wanted["weight_decay"] > 0), name


@pytest.mark.parametrize(
    ("layer_decay", "depth", "ratio"),
    [(0.85, 40, 1.27696e-3), (0.95, 40, 0.122087), (0.9, 40, 0.0133028), (0.8, 24, 3.77789e-3), (0.75, 24, 7.52543e-4)],
)
def test_lowest_and_highest_learning_rate_differ_as_in_the_original_logs(layer_decay: float, depth: int, ratio: float) -> None:
    with meta_device():
        student = original_student("eva01_finetune", depth)
    scales = [group["lr_scale"] for group in parameter_groups(student, OptimSettings(lr=1.0, layer_decay=layer_decay))]
    assert max(scales) == 1.0
    assert min(scales) == pytest.approx(ratio, rel=5e-6)
    if (layer_decay, depth) == (0.85, 40):  # cls/intermed_ft_22k_60ep_sz224, epoch 0
        settings = OptimSettings(**EVA, **G_21K)
        mean = fsum(lr_at(step, settings, steps_per_epoch=3466, epochs=60) for step in range(3466)) / 3466
        assert mean * min(scales) == pytest.approx(4.25537397934442e-9, rel=1e-12)


def test_our_students_mask_token_is_below_and_their_heads_are_above_all_layers() -> None:
    settings = OptimSettings(lr=1.0, layer_decay=0.5)
    masked = MaskedStudent(MaskedSettings(name="vit_nano_patch4_32"), 8)  # 4 blocks
    of = {name: group["lr_scale"] for name, group in by_name(masked, parameter_groups(masked, settings)).items()}
    assert of.keys() == dict(masked.named_parameters()).keys()
    assert [of[name] for name in ("mask_token", "trunk.pos_embed", "trunk.blocks.0.attn.proj.weight")] == [2**-5, 2**-5, 2**-4]
    assert [of[name] for name in ("trunk.blocks.3.mlp.fc2.bias", "trunk.norm.weight", "head.weight")] == [2**-1, 1.0, 1.0]
    # stem, three stages of one, one and two blocks, head
    conv = Classifier(ClassifierSettings(name="convnet_nano_32"), 3)
    of = {name: group["lr_scale"] for name, group in by_name(conv, parameter_groups(conv, settings)).items()}
    assert of["trunk.stem.conv.weight"] == min(of.values()) == 2**-5
    assert of["trunk.stages.2.1.conv2_kxk.conv.weight"] == 2**-1
    assert of["trunk.head.fc.weight"] == 1.0


def test_what_does_not_train_is_in_no_group() -> None:
    student = original_student("eva01_mim", 1)
    student.trunk.patch_embed.requires_grad_(False)
    student.mask_token.requires_grad_(False)
    found = by_name(student, parameter_groups(student, OptimSettings(lr=1.0, layer_decay=0.5)))
    everything = {name for name, _ in student.named_parameters()}
    assert everything - found.keys() == {"trunk.patch_embed.proj.weight", "trunk.patch_embed.proj.bias", "mask_token"}


class Flat(nn.Module):
    """Matrices only, of a model that does not say its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias, self.pos_embed_x = (nn.Parameter(torch.ones(2, 2)) for _ in range(3))

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed_*"}  # timm's XCiT has such a pattern


def test_biases_and_listed_parameters_of_any_shape_do_not_decay() -> None:
    student = Student(Flat(), pretraining=False)
    found = by_name(student, parameter_groups(student, OptimSettings(lr=1.0)))
    assert {name: group["weight_decay"] for name, group in found.items()} == {
        "trunk.weight": 0.05, "trunk.bias": 0.0, "trunk.pos_embed_x": 0.0,
    }  # fmt: skip


def test_layer_decay_needs_known_layers() -> None:
    with pytest.raises(UserError, match=r"optim\.layer_decay=0\.5: Flat does not say its layers"):
        parameter_groups(Student(Flat(), pretraining=False), OptimSettings(lr=1.0, layer_decay=0.5))


# ---- towers


def eva_clips_name(name: str) -> str:
    name = name.removeprefix("model.").replace("visual.trunk.", "visual.").replace("visual.head.proj.", "visual.head.")
    for ours, theirs in {"attn.norm.": "attn.inner_attn_ln.", **RENAMED["eva02_b"]}.items():
        name = name.replace(ours, theirs)
    return name


def test_groups_of_both_towers_are_eva_clips(shared: Path) -> None:
    """3 image blocks, 2 text blocks: group, rate and weight decay of every parameter."""
    golden = json.loads((shared / "golden" / "param_groups.json").read_text())["cases"]["eva02_clip"]
    made = golden["args"]
    settings = OptimSettings(
        lr=made["lr"], weight_decay=made["wd"],
        image=TowerSettings(lr=made["visual_lr"], layer_decay=made["visual_ld"], weight_decay=made["visual_wd"]),
        text=TowerSettings(lr=made["text_lr"], layer_decay=made["text_ld"], weight_decay=made["text_wd"]),
    )  # fmt: skip
    student = ClipStudent(clip_settings("eva02_of_tests", proj_bias=True))
    groups = parameter_groups(student, settings)
    assert len(groups) == golden["n_groups"]
    found = {eva_clips_name(name): group for name, group in by_name(student, groups).items()}
    assert found.keys() == golden["parameters"].keys()
    towers = student.towers()
    for name, wanted in golden["parameters"].items():
        assert found[name]["lr_scale"] * settings.lr == pytest.approx(wanted["lr"] * wanted["lr_scale"], rel=1e-12), name
        assert found[name]["weight_decay"] == pytest.approx(wanted["weight_decay"], rel=1e-12), name
        assert wanted["group"] == name.partition(".")[0] or name == "logit_scale"
    inside = [parameter for tower in towers.values() for parameter in tower.module.parameters()]
    assert {id(p) for p in student.parameters()} - {id(p) for p in inside} == {id(student.model.logit_scale)}


def test_a_tower_without_own_values_has_the_general_ones() -> None:
    student = ClipStudent(clip_settings())
    general = by_name(student, parameter_groups(student, OptimSettings(lr=1.0, layer_decay=0.5)))
    told = TowerSettings(lr=1.0, layer_decay=0.5, weight_decay=0.05)
    both = by_name(student, parameter_groups(student, OptimSettings(lr=1.0, image=told, text=told)))
    assert {name: group["lr_scale"] for name, group in general.items()} == {name: g["lr_scale"] for name, g in both.items()}
    scales = {name.removeprefix("model."): group["lr_scale"] for name, group in general.items()}
    assert scales["text.token_embedding.weight"] == scales["visual.trunk.pos_embed"] == 2**-3
    assert scales["text.transformer.resblocks.1.ln_1.bias"] == scales["visual.trunk.blocks.1.norm1.bias"] == 2**-1
    assert scales["logit_scale"] == scales["visual.head.proj.weight"] == scales["text.text_projection"] == 1
    assert general["model.text.positional_embedding"]["weight_decay"] == 0  # a matrix
    assert general["model.text.token_embedding.weight"]["weight_decay"] == 0.05


def test_the_schedule_multiplies_every_towers_rates() -> None:
    common: dict[str, Any] = {"warmup_steps": 3, "weight_decay": 0.1, "weight_decay_end": 0.4}
    settings = OptimSettings(
        lr=1e-3, min_lr=1e-4, text=TowerSettings(lr=2e-4, layer_decay=0.5, weight_decay=0.05), **common
    )
    student = ClipStudent(clip_settings())
    groups = parameter_groups(student, settings)
    of = by_name(student, groups)
    text = OptimSettings(lr=2e-4, min_lr=2e-5, **common | {"weight_decay": 0.05, "weight_decay_end": 0.2})
    for step in (0, 2, 3, 7, 19):
        set_rates(groups, rates_at(step, settings, steps_per_epoch=10, epochs=2))
        wanted = [rates_at(step, one, steps_per_epoch=10, epochs=2) for one in (text, settings)]
        projection, table = of["model.text.text_projection"], of["model.text.token_embedding.weight"]
        assert (projection["lr"], projection["weight_decay"]) == pytest.approx(wanted[0][:2], rel=1e-12)
        assert table["lr"] == pytest.approx(wanted[0].lr / 8, rel=1e-12)
        head, scale = of["model.visual.head.proj.weight"], of["model.logit_scale"]
        assert (head["lr"], head["weight_decay"]) == pytest.approx(wanted[1][:2], rel=1e-12)
        assert (scale["lr"], scale["weight_decay"]) == pytest.approx((wanted[1].lr, 0.0), rel=1e-12)


def test_vitamins_stem_is_its_lowest_layer() -> None:
    with meta_device():
        trunk = timm.create_model("vitamin_small_224", num_classes=0)
    student = Student(trunk, pretraining=False)
    found = by_name(student, parameter_groups(student, OptimSettings(lr=1.0, layer_decay=0.9)))
    scales = {name: group["lr_scale"] for name, group in found.items()}
    stem = {scale for name, scale in scales.items() if name.startswith(("trunk.patch_embed.", "trunk.pos_embed"))}
    assert list(stem) == pytest.approx([0.9**15])
    for block in range(14):
        assert scales[f"trunk.blocks.{block}.attn.qkv.weight"] == pytest.approx(0.9 ** (14 - block)), block
    assert scales["trunk.fc_norm.weight"] == 1


def test_mistakes_in_the_settings_of_towers() -> None:
    masked = MaskedStudent(MaskedSettings(name="vit_nano_patch4_32"), 8)
    with pytest.raises(UserError, match=r"optim\.text: this student has no text tower"):
        parameter_groups(masked, OptimSettings(lr=1.0, text=TowerSettings(lr=0.1)))
    with pytest.raises(ValueError, match=r"optim\.image\.weight_decay=0\.1 follows the schedule of optim\.weight_decay"):
        OptimSettings(lr=1.0, weight_decay=0.0, image=TowerSettings(weight_decay=0.1))
    student = Student(Flat(), pretraining=False)
    student.towers = lambda: {"text": Tower(student.trunk, student.trunk, None)}  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"optim\.text\.layer_decay=0\.5: Flat does not say its layers"):
        parameter_groups(student, OptimSettings(lr=1.0, text=TowerSettings(layer_decay=0.5)))


def test_lamb_is_refused_where_tensors_are_cut_up() -> None:
    lamb = OptimSettings(lr=1.0, optimizer="lamb")
    for stage in (1, 2, 3):
        check_sharding(OptimSettings(lr=1.0), stage)
        with pytest.raises(UserError, match=rf"run\.zero_stage={stage} cuts up; set run\.zero_stage=0"):
            check_sharding(lamb, stage)
    check_sharding(lamb, 0)
    with pytest.raises(ValueError, match=r"optim\.lamb\.trust=\[10\.0, 1\.0\]"):
        OptimSettings(lr=1.0, lamb={"trust": (10.0, 1.0)})
    assert OptimSettings(lr=1.0, lamb={"trust": (1.0, 1.0)}).lamb.trust == (1.0, 1.0)  # a ratio of 1: no layer is adapted


@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "lars"])
def test_a_skipped_step_changes_nothing(optimizer: str) -> None:
    """Nor does it leave NaN behind: the next step is the one of a run without it."""
    settings = OptimSettings.model_validate({"lr": 0.1, "optimizer": optimizer})

    def steps(*gradients: float) -> tuple[torch.Tensor, list[torch.Tensor]]:
        weight = nn.Parameter(torch.arange(1.0, 7.0).reshape(2, 3))
        made = build_optimizer([{"params": [weight], "lr": 0.1, "weight_decay": 0.05, "decays": True}], settings)
        seen = []
        for gradient in gradients:
            weight.grad = torch.full_like(weight, gradient)
            made.found_inf = torch.tensor(float(gradient != gradient))
            made.grad_scale = torch.tensor(1.0)
            made.step()
            seen.append(weight.detach().clone())
        return weight, seen

    _, seen = steps(0.5, float("nan"), float("nan"), 0.25)
    _, undisturbed = steps(0.5, 0.25)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], seen[2])
    assert torch.equal(seen[3], undisturbed[1])
    assert not torch.equal(undisturbed[0], undisturbed[1])
