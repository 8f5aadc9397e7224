"""Seeding a trunk from an earlier stage: what is copied, what is resized by which rule, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F

from eva_mim.config import UserError
from eva_mim.convert.report import KeyReport
from eva_mim.files import sha256
from eva_mim.handover import content_hash, read_parent, seed_trunk
from eva_mim.students import TrunkSettings
from eva_mim.students.trunk import build_trunk

CLASSES = ("ant", "bee", "cat")


def trunk(seed: int, name: str = "vit_nano_patch4_32", image_size: int | None = None, patch_size: int | None = None,
          **options: Any) -> nn.Module:
    """A trunk whose every parameter is random (timm starts biases at 0 and norms at 1)."""
    model = build_trunk(TrunkSettings(name=name, image_size=image_size, patch_size=patch_size), **{"num_classes": 0} | options)
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            drawn = torch.randn(value.shape, generator=generator)
            value.copy_(drawn.abs() + 0.5 if name.endswith("running_var") else drawn)
    return model


def write_stage(folder: Path, model: nn.Module, **record: Any) -> Path:
    """A finished stage's folder: weights and record."""
    folder.mkdir(exist_ok=True)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "lineage.json").write_text(json.dumps(record))
    return folder


def seed(model: nn.Module, path: Path, classes: tuple[str, ...] | None = None) -> tuple[KeyReport, dict[str, Tensor]]:
    """(report, state afterwards)."""
    return seed_trunk(model, read_parent(path), classes), model.state_dict()


@pytest.mark.parametrize("name", ["vit_nano_patch4_32", "convnet_nano_32"])
@pytest.mark.parametrize("bare", [False, True])
def test_the_weights_are_the_parents_bit_for_bit(tmp_path: Path, name: str, bare: bool) -> None:
    parent = trunk(1, name)
    folder = write_stage(tmp_path / "parent", parent)
    report, state = seed(trunk(2, name), folder / "model.safetensors" if bare else folder)
    for key, value in parent.state_dict().items():
        assert torch.equal(state[key], value), key
    assert sorted(report.loaded) == sorted(state)
    assert not report.resized + report.new + report.ignored
    images = torch.randn(2, 3, 32, 32)
    child = trunk(3, name)
    seed(child, folder)
    with torch.no_grad():
        assert torch.equal(child.eval()(images), parent.eval()(images))


def test_timm_itself_reads_the_same_weights(tmp_path: Path) -> None:
    parent = trunk(1)
    file = write_stage(tmp_path / "parent", parent) / "model.safetensors"
    theirs = timm.create_model("vit_nano_patch4_32", num_classes=0, checkpoint_path=str(file))
    _, state = seed(trunk(2), file)
    assert all(torch.equal(value, state[name]) for name, value in theirs.state_dict().items())


@pytest.mark.parametrize(("size", "grid"), [(40, 10), (24, 6)])
def test_positions_are_resized_as_timm_does(tmp_path: Path, size: int, grid: int) -> None:
    """timm's function, and torch's antialiased bicubic with the class row kept."""
    parent = trunk(1)
    report, state = seed(trunk(2, image_size=size), write_stage(tmp_path / "parent", parent, grid=[8, 8]))
    table = parent.state_dict()["pos_embed"]
    assert torch.equal(state["pos_embed"], resample_abs_pos_embed(table, new_size=[grid, grid], num_prefix_tokens=1))
    cells = table[:, 1:].reshape(1, 8, 8, 96).permute(0, 3, 1, 2)
    resized = F.interpolate(cells, (grid, grid), mode="bicubic", antialias=True).permute(0, 2, 3, 1).reshape(1, grid**2, 96)
    assert torch.allclose(state["pos_embed"], torch.cat([table[:, :1], resized], dim=1), atol=1e-6)
    assert report.resized == ["pos_embed"]
    assert len(report.loaded) == len(state) - 1


def test_a_position_table_without_class_row_is_resized_whole(tmp_path: Path) -> None:
    parent = trunk(1, no_embed_class=True)
    report, state = seed(trunk(2, image_size=40, no_embed_class=True), write_stage(tmp_path / "parent", parent))
    table = parent.state_dict()["pos_embed"]
    assert table.shape[1] == 64
    assert torch.equal(state["pos_embed"], resample_abs_pos_embed(table, new_size=[10, 10], num_prefix_tokens=0))
    assert report.resized == ["pos_embed"]


def test_a_resized_patch_kernel_answers_the_same_to_enlarged_pictures(tmp_path: Path) -> None:
    parent = trunk(1)
    child = trunk(2, image_size=64, patch_size=8)
    report, _ = seed(child, write_stage(tmp_path / "parent", parent))
    assert report.resized == ["patch_embed.proj.weight"]
    patches = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    enlarged = F.interpolate(patches, (8, 8), mode="bicubic", antialias=True)
    old, new = (model.get_submodule("patch_embed.proj")(x) for model, x in ((parent, patches), (child, enlarged)))
    assert torch.allclose(old, new, atol=2e-4)


def test_fc_norm_can_start_fresh_as_in_eva(tmp_path: Path) -> None:
    """The parent's norm is named as left out, and everything else is loaded."""
    parent = trunk(1, global_pool="token")
    child = trunk(2, global_pool="avg", num_classes=3)
    report = seed_trunk(child, read_parent(write_stage(tmp_path / "parent", parent)), CLASSES, fresh_norm=True)
    state = child.state_dict()
    assert not torch.equal(state["fc_norm.weight"], parent.state_dict()["norm.weight"])
    assert torch.equal(state["fc_norm.weight"], trunk(2, global_pool="avg", num_classes=3).state_dict()["fc_norm.weight"])
    assert sorted(report.new) == ["fc_norm.bias", "fc_norm.weight", "head.bias", "head.weight"]
    assert sorted(report.ignored) == ["norm.bias", "norm.weight"]
    assert torch.equal(state["blocks.0.mlp.fc1.weight"], parent.state_dict()["blocks.0.mlp.fc1.weight"])


def test_fc_norm_starts_as_the_parents_norm(tmp_path: Path) -> None:
    parent = trunk(1, global_pool="token")
    report, state = seed(trunk(2, global_pool="avg", num_classes=3), write_stage(tmp_path / "parent", parent), CLASSES)
    assert torch.equal(state["fc_norm.weight"], parent.state_dict()["norm.weight"])
    assert torch.equal(state["fc_norm.bias"], parent.state_dict()["norm.bias"])
    assert {"fc_norm.weight", "fc_norm.bias"} <= set(report.loaded)
    assert sorted(report.new) == ["head.bias", "head.weight"]


def test_the_head_is_kept_for_the_same_classes_and_new_for_others(tmp_path: Path) -> None:
    parent = trunk(1, global_pool="avg", num_classes=3)
    folder = write_stage(tmp_path / "parent", parent, classes=list(CLASSES))
    for classes, outputs in ((CLASSES, 3), (CLASSES[::-1], 3), (("ant", "bee"), 2), (None, 3)):
        child = trunk(2, global_pool="avg", num_classes=outputs)
        fresh = {name: value.clone() for name, value in child.state_dict().items()}
        report, state = seed(child, folder, classes)
        kept = classes == CLASSES
        expected = parent.state_dict() if kept else fresh
        for name in ("head.weight", "head.bias"):
            assert torch.equal(state[name], expected[name])
            assert (name in report.loaded, name in report.new, name in report.ignored) == (kept, not kept, not kept)
        assert torch.equal(state["blocks.3.mlp.fc2.weight"], parent.state_dict()["blocks.3.mlp.fc2.weight"])


def test_a_convolutional_head_is_found_by_its_own_name(tmp_path: Path) -> None:
    parent = trunk(1, "convnet_nano_32", num_classes=3)
    folder = write_stage(tmp_path / "parent", parent, classes=list(CLASSES))
    report, state = seed(trunk(2, "convnet_nano_32", num_classes=3), folder, CLASSES)
    assert torch.equal(state["head.fc.weight"], parent.state_dict()["head.fc.weight"])
    report, _ = seed(trunk(2, "convnet_nano_32", num_classes=5), folder, ("a", "b", "c", "d", "e"))
    assert sorted(report.new) == ["head.fc.bias", "head.fc.weight"]


def test_every_key_is_accounted_for_once(tmp_path: Path) -> None:
    parent = trunk(1, global_pool="avg", num_classes=3)
    folder = write_stage(tmp_path / "parent", parent, classes=list(CLASSES))
    report, state = seed(trunk(2, global_pool="avg", num_classes=2, image_size=40), folder, ("x", "y"))
    assert sorted(report.loaded + report.resized + report.new) == sorted(state)
    assert sorted(report.loaded + report.resized + report.ignored) == sorted(parent.state_dict())


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("vit_mini_patch4_32", {}, "blocks.0.attn.proj.weight: [96, 96] in the checkpoint, [128, 128] here"),
        ("convnet_nano_32", {}, "stem.conv.weight: not in the checkpoint"),
        ("vit_nano_patch4_32", {"depth": 5}, "blocks.4.attn.proj.bias: not in the checkpoint"),
        ("vit_nano_patch4_32", {"depth": 3}, "blocks.3.attn.proj.bias: [96] in the checkpoint, not here"),
    ],
)
def test_another_architecture_is_refused_by_keys_and_shapes(
    tmp_path: Path, name: str, options: dict[str, Any], said: str
) -> None:
    folder = write_stage(tmp_path / "parent", trunk(1))
    child = trunk(2, name, **options)
    before = {key: value.clone() for key, value in child.state_dict().items()}
    with pytest.raises(UserError) as caught:
        seed(child, folder)
    assert "another architecture" in str(caught.value)
    assert str(folder) in str(caught.value)
    assert said in str(caught.value) or "more" in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in child.state_dict().items())


@pytest.mark.parametrize("length", [0, 4, 200, 5000, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, length: int) -> None:
    file = write_stage(tmp_path / "parent", trunk(1)) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        read_parent(tmp_path / "parent")


def test_missing_parents_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "no.safetensors"):
        with pytest.raises(UserError, match="does not exist"):
            read_parent(path)


def test_a_parent_is_known_by_its_weights(tmp_path: Path) -> None:
    one, other = (write_stage(tmp_path / str(seed), trunk(seed)) for seed in (1, 2))
    copy = write_stage(tmp_path / "copy", trunk(1), note="another record")
    assert content_hash(one) == content_hash(copy) == sha256(one / "model.safetensors")
    assert content_hash(one) != content_hash(other)
    assert load_file(one / "model.safetensors").keys() == read_parent(one).weights.keys()
