"""Seeding a trunk from an earlier stage: what is copied, what is resized by which rule, and what is refused."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models.eva import Eva
from torch import Tensor, nn
from torch.nn import functional as F

from eva_mim.core.errors import UserError
from eva_mim.core.files import sha256
from eva_mim.core.report import KeyReport
from eva_mim.run.loaders import seed_from
from eva_mim.run.recipe import Recipe
from eva_mim.students import MaskedSettings
from eva_mim.students.masked import MaskedStudent
from eva_mim.trunks import TrunkSettings
from eva_mim.trunks.create import build_trunk
from eva_mim.weights import HandOverSettings
from eva_mim.weights.export import write_timm
from eva_mim.weights.files.read import content_hash
from eva_mim.weights.files.tensors import Entry
from eva_mim.weights.handover import read_parent, seed_trunk
from eva_mim.weights.names import eva as names
from eva_mim.weights.names import families
from eva_mim.weights.names import translate as source
from eva_mim.weights.names.eva import from_eva
from tests.students.golden import below, pixels
from tests.tiny import CLASSIFY
from tests.weights.golden_names import checkpoint

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
    (folder / "lineage.json").write_text(json.dumps({"finished": True} | record))
    return folder


def seed(model: nn.Module, path: Path, classes: tuple[str, ...] | None = None) -> tuple[KeyReport, dict[str, Tensor]]:
    """(report, state afterwards)."""
    return seed_trunk(model, read_parent(path), classes=classes), model.state_dict()


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


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
@pytest.mark.parametrize(("name", "kernel"), [("vit_nano_patch4_32", "patch_embed.proj"), ("convnet_nano_32", "stem.conv")])
def test_a_kernel_of_rgb_becomes_one_for_other_channels_as_timm_makes_it(
    tmp_path: Path, name: str, kernel: str, channels: int
) -> None:
    """Against timm's own loading of the file into a model with so many channels."""
    file = write_stage(tmp_path / "parent", trunk(1, name)) / "model.safetensors"
    pretrained = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(file)}}
    theirs = timm.create_model(name, in_chans=channels, num_classes=0, **pretrained)
    report, state = seed(trunk(2, name, in_chans=channels), file)
    assert all(torch.equal(value, state[key]) for key, value in theirs.state_dict().items())
    assert state[f"{kernel}.weight"].shape[1] == channels
    assert report.resized == [f"{kernel}.weight"]
    assert "the kernel of RGB " + ("summed" if channels == 1 else f"repeated and scaled by 3/{channels}") in report.reasons[
        f"{kernel}.weight"]
    assert len(report.loaded) == len(state) - 1
    assert not report.new + report.ignored


def test_a_grey_image_is_the_same_to_the_summed_kernel(tmp_path: Path) -> None:
    parent, child = trunk(1).eval(), trunk(2, in_chans=1).eval()
    seed(child, write_stage(tmp_path / "parent", parent))
    grey = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(child(grey), parent(grey.expand(-1, 3, -1, -1)), atol=1e-4)


def test_channels_and_patch_size_change_together(tmp_path: Path) -> None:
    """First the channels, then the patch; the report says both."""
    parent = trunk(1)
    report, state = seed(trunk(2, in_chans=5, patch_size=8), write_stage(tmp_path / "parent", parent, grid=[8, 8]))
    kernel = parent.state_dict()["patch_embed.proj.weight"]
    wanted = resample_patch_embed(kernel.repeat(1, 2, 1, 1)[:, :5] * 3 / 5, [8, 8])
    assert torch.allclose(state["patch_embed.proj.weight"], wanted, atol=1e-5)
    assert report.resized.count("patch_embed.proj.weight") == 1
    assert re.search(r"repeated and scaled by 3/5 \(timm\); .*pseudo-inverse", report.reasons["patch_embed.proj.weight"])


@pytest.mark.parametrize(("old", "new"), [(5, 3), (1, 3), (4, 5)])
def test_a_kernel_of_other_channels_is_not_made_one_of_rgb(tmp_path: Path, old: int, new: int) -> None:
    folder, child = write_stage(tmp_path / "parent", trunk(1, in_chans=old)), trunk(2, in_chans=new)
    before = {name: value.clone() for name, value in child.state_dict().items()}
    with pytest.raises(UserError, match=rf"the patch kernel is for images of {old} channels and cannot be made one for {new},"):
        seed(child, folder)
    assert all(torch.equal(value, before[name]) for name, value in child.state_dict().items())


def test_each_tensor_is_read_once_and_the_names_are_classified_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, calls = write_stage(tmp_path / "parent", trunk(1)), Counter[object]()

    def counted(function: Callable[..., Any], key: Callable[[Any], object]) -> Callable[..., Any]:
        return lambda *given: (calls.update([key(given[0])]), function(*given))[1]

    monkeypatch.setattr(Entry, "load", counted(Entry.load, lambda entry: entry.pieces[0].start))
    for module in (source, names):
        monkeypatch.setattr(module, "detect", counted(families.detect, lambda weights: "classified"))
    report, _ = seed(trunk(2), folder)
    assert set(calls.values()) == {1}
    assert len(calls) == len(report.loaded) + 1


def test_what_did_not_arrive_is_noticed(tmp_path: Path) -> None:
    """Two names that share their elements hold what was copied last."""
    folder, child = write_stage(tmp_path / "parent", trunk(1)), trunk(2)
    child.blocks[1].mlp.fc1.weight = child.blocks[0].mlp.fc1.weight  # type: ignore[index, union-attr]
    with pytest.raises(RuntimeError, match=r"blocks\.0\.mlp\.fc1\.weight"):
        seed(child, folder)


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
    folder = write_stage(tmp_path / "parent", parent, grid=[8, 8])
    report, state = seed(trunk(2, image_size=40, no_embed_class=True), folder)
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
    drop = HandOverSettings(norm="drop")
    report = seed_trunk(child, read_parent(write_stage(tmp_path / "parent", parent)), drop, CLASSES)
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


def test_a_converted_classifier_knows_its_classes(tmp_path: Path) -> None:
    """Without a record of ours, from timm's config.json."""
    parent = trunk(1, global_pool="avg", num_classes=3)
    folder = write_stage(tmp_path / "parent", parent)
    (folder / "lineage.json").unlink()
    (folder / "config.json").write_text(json.dumps({"architecture": "vit_nano_patch4_32", "label_names": list(CLASSES)}))
    report, state = seed(trunk(2, global_pool="avg", num_classes=3), folder, CLASSES)
    assert torch.equal(state["head.weight"], parent.state_dict()["head.weight"])
    assert not report.new


def test_a_convolutional_head_is_found_by_its_own_name(tmp_path: Path) -> None:
    parent = trunk(1, "convnet_nano_32", num_classes=3)
    folder = write_stage(tmp_path / "parent", parent, classes=list(CLASSES))
    report, state = seed(trunk(2, "convnet_nano_32", num_classes=3), folder, CLASSES)
    assert torch.equal(state["head.fc.weight"], parent.state_dict()["head.fc.weight"])
    report, _ = seed(trunk(2, "convnet_nano_32", num_classes=5), folder, ("a", "b", "c", "d", "e"))
    assert sorted(report.new) == ["head.fc.bias", "head.fc.weight"]


def test_every_key_is_accounted_for_once(tmp_path: Path) -> None:
    parent = trunk(1, global_pool="avg", num_classes=3)
    folder = write_stage(tmp_path / "parent", parent, classes=list(CLASSES), grid=[8, 8])
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
    with pytest.raises(UserError, match=r"init_from: .*(empty|truncated|damaged|neither a safetensors)"):
        read_parent(tmp_path / "parent")


def test_missing_parents_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "no.safetensors"):
        with pytest.raises(UserError, match=r"does not exist|no checkpoint that is known here"):
            read_parent(path)


def test_a_parent_is_known_by_its_weights(tmp_path: Path) -> None:
    one, other = (write_stage(tmp_path / str(seed), trunk(seed)) for seed in (1, 2))
    copy = write_stage(tmp_path / "copy", trunk(1), note="another record")
    assert content_hash(one) == content_hash(copy) == sha256(one / "model.safetensors")
    assert content_hash(one) != content_hash(other)
    assert load_file(one / "model.safetensors").keys() == read_parent(one).weights.keys()


def eva(**options: Any) -> Eva:
    """The fixture eva02_b_mim's trunk, with other parts."""
    options = {"embed_dim": 96, "depth": 2, "num_heads": 4, "mlp_ratio": 256 / 96} | options
    return Eva(img_size=112, patch_size=14, qkv_fused=False, swiglu_mlp=True, scale_mlp=True, use_rot_pos_emb=True, **options)


@torch.no_grad()
def test_an_original_checkpoint_seeds_a_trunk_that_answers_as_the_original(shared: Path, tmp_path: Path) -> None:
    state, golden, _ = checkpoint(shared, "eva02_b_mim")
    torch.save({"module": state, "epoch": 3}, tmp_path / "eva.pt")
    child = trunk(5, "golden_eva02_b_mim", global_pool="token")
    report, _ = seed(child, tmp_path / "eva.pt")
    assert not report.new + report.resized
    assert {"mask_token", "lm_head.weight" if "lm_head.weight" in report.ignored else "head.weight", "rope.freqs_cos"} <= set(
        report.ignored
    )
    student = MaskedStudent(MaskedSettings(name="golden_eva02_b_mim"), 64).eval()
    student.trunk.load_state_dict(child.state_dict())
    student.mask_token.copy_(state["mask_token"])
    tokens = student.tokens(pixels(golden["in/image"]), golden["in/mask"].flatten(1))
    assert (tokens - golden["out/final_norm_tokens"]).abs().max() < 2e-5


def test_a_masked_model_seeds_a_clip_tower_and_what_it_lacks_is_named(shared: Path, tmp_path: Path) -> None:
    """EVA-CLIP's towers have norms inside attention and a projection; class token and final norm are reused."""
    state, _, _ = checkpoint(shared, "eva02_b_mim")
    torch.save(state, tmp_path / "eva.pt")
    tower = eva(global_pool="token", num_classes=60, scale_attn_inner=True)
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    report, after = seed(tower, tmp_path / "eva.pt")
    inner = [f"blocks.{block}.attn.norm.{leaf}" for block in (0, 1) for leaf in ("weight", "bias")]
    assert sorted(report.new) == sorted([*inner, "head.weight", "head.bias"])
    assert all(torch.equal(after[name], before[name]) for name in report.new)
    assert report.reasons["blocks.0.attn.norm.weight"].startswith("a norm inside attention")
    for name in ("cls_token", "norm.weight", "norm.bias", "pos_embed"):
        assert torch.equal(after[name], state[name])
        assert name in report.loaded
    assert torch.equal(after["blocks.1.mlp.fc1_g.weight"], state["blocks.1.mlp.w1.weight"])


@pytest.mark.parametrize("rule", ["timm", "original"])
def test_positions_follow_the_rule_on_a_grid_that_is_not_square(tmp_path: Path, rule: str) -> None:
    """Sixty-four cells are 8 x 8 or 4 x 16: the record says which, never the count."""
    parent = trunk(1, img_size=(16, 64))
    child = trunk(2)
    settings = HandOverSettings(positions=rule)  # type: ignore[arg-type]
    folder = write_stage(tmp_path / "parent", parent, grid=[4, 16])
    report = seed_trunk(child, read_parent(folder, settings), settings)
    table = parent.state_dict()["pos_embed"]
    cells = table[:, 1:].reshape(1, 4, 16, 96).permute(0, 3, 1, 2)
    resized = F.interpolate(cells, (8, 8), mode="bicubic", antialias=rule == "timm").permute(0, 2, 3, 1).reshape(1, 64, 96)
    assert torch.allclose(child.state_dict()["pos_embed"], torch.cat([table[:, :1], resized], dim=1), atol=1e-6)
    assert report.resized == ["pos_embed"]
    assert rule in report.reasons["pos_embed"]


def test_a_parent_that_does_not_say_its_grid_is_asked_for_it(tmp_path: Path) -> None:
    parent, child = trunk(1), trunk(2, image_size=40)
    save_file(parent.state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match=r"set hand_over.grid=\[rows, columns\]"):
        seed(child, tmp_path / "weights.safetensors")
    settings = HandOverSettings(grid=(8, 8))
    assert seed_trunk(child, read_parent(tmp_path / "weights.safetensors", settings), settings).resized == ["pos_embed"]


def test_one_table_of_relative_positions_becomes_one_a_block(shared: Path, tmp_path: Path) -> None:
    """The state after the original loader, at 12 x 12."""
    state, golden, _ = checkpoint(shared, "eva01_relpos")
    torch.save({"module": state}, tmp_path / "eva.pt")
    settings = HandOverSettings(norm="drop", grid=(8, 8))
    child = trunk(3, "golden_eva01_relpos_cls", image_size=168, global_pool="avg")
    report = seed_trunk(child, read_parent(tmp_path / "eva.pt", settings), settings)
    expected = from_eva(below(golden, "finetune/")).weights
    made = child.state_dict()
    assert sorted(report.resized) == [f"blocks.{block}.attn.relative_position_bias_table" for block in (0, 1)]
    fresh = {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert fresh >= set(report.new) >= {"fc_norm.weight", "fc_norm.bias"}
    assert all((made[name] - expected[name]).abs().max() < 1e-5 for name in expected if name not in fresh)


def test_an_unfinished_stage_is_no_parent(tmp_path: Path) -> None:
    folder = write_stage(tmp_path / "parent", trunk(1), finished=False)
    with pytest.raises(UserError, match="is not finished"):
        read_parent(folder)


@pytest.mark.parametrize(("mean", "warned"), [([0.481, 0.458, 0.408], False), ([0.5, 0.5, 0.5], True), (None, False)])
def test_a_parent_that_saw_images_normalised_otherwise_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mean: list[float] | None, warned: bool
) -> None:
    """The child's images are normalised with CLIP's figures, as timm says of it; a bare file of weights tells nothing."""
    parent, child = trunk(1), trunk(2)
    settings = TrunkSettings(name="vit_nano_patch4_32", mean=mean and tuple(mean), std=mean and OPENAI_DATASET_STD)
    write_timm(tmp_path, parent, settings, parent.state_dict())
    if mean is None:
        (tmp_path / "config.json").unlink()
    recipe = Recipe.model_validate(CLASSIFY | {"view": {}, "init_from": str(tmp_path)})
    assert seed_from(recipe, child) is not None
    said = capsys.readouterr().err
    expected = f"images are normalised with mean {list(OPENAI_DATASET_MEAN)}, but {tmp_path} was trained with [0.5, 0.5, 0.5]"
    assert said.count("warning") == said.count(expected) == int(warned)
    assert torch.equal(child.state_dict()["blocks.0.attn.qkv.weight"], parent.state_dict()["blocks.0.attn.qkv.weight"])
