"""Locked towers: what trains, what stays as it is to the last bit, and what costs no memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from eva_mim.core.batches import ImageTextBatch
from eva_mim.core.contracts import Rates
from eva_mim.core.errors import UserError
from eva_mim.engine import RunSettings
from eva_mim.engine.local import LocalEngine
from eva_mim.optim import OptimSettings
from eva_mim.students.clip import ClipStudent
from eva_mim.tasks.contrastive import Contrastive, ImageText
from tests.students.tiny_towers import clip_folder, clip_settings, pairs
from tests.tiny import CLIP, losses, run, write_recipe

CPU = torch.device("cpu")


@pytest.fixture
def source(tmp_path: Path) -> str:
    """A clip stage whose text tower the others take."""
    torch.manual_seed(0)
    return clip_folder(tmp_path / "source", ClipStudent(clip_settings()))


def trains(student: ClipStudent, prefix: str) -> set[str]:
    """Names below a prefix that train, cut to what tells groups apart."""
    cut = {"transformer": 3, "trunk": 3}
    names = [name.removeprefix(prefix) for name, parameter in student.named_parameters()
             if name.startswith(prefix) and parameter.requires_grad]  # fmt: skip
    return {".".join(name.split(".")[: cut.get(name.split(".")[0], 1)]) for name in names}


@pytest.mark.parametrize(
    ("unlocked", "image", "text"),
    [
        (0, set[str](), set[str]()),
        (1, {"blocks.1", "norm"}, {"text_projection"}),
        (2, {"blocks.1", "norm", "blocks.0"}, {"text_projection", "transformer.resblocks.1", "ln_final"}),
    ],
)
def test_unlocked_groups_are_counted_from_the_end(source: str, unlocked: int, image: set[str], text: set[str]) -> None:
    student = ClipStudent(clip_settings(
        lock_image=True, image_unlocked_groups=unlocked, lock_text=True, text_unlocked_groups=unlocked,
        text={"init_from": source},
    ))  # fmt: skip
    # "blocks.1.attn..." -> "blocks.1", "norm.weight" -> "norm"
    found = {name.removeprefix("trunk.") for name in trains(student, "model.visual.") if name.startswith("trunk.")}
    assert {name.removesuffix(".weight").removesuffix(".bias") for name in found} == image
    assert trains(student, "model.text.") == text
    assert student.model.visual.head.proj.weight.requires_grad
    assert student.model.logit_scale.requires_grad


def moved(student: ClipStudent, steps: int = 3, **optim: Any) -> tuple[set[str], LocalEngine]:
    """Names of weights and statistics that a few steps change, and the engine that made them."""
    settings = OptimSettings(lr=1e-2, layer_decay=0.9, **optim)
    engine = LocalEngine(student, RunSettings(epochs=1, global_batch=3, precision="fp32"), settings, CPU)
    student.train()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    for step in range(steps):
        images, texts = pairs(step)
        batch = ImageTextBatch(torch.arange(3), images, texts, torch.arange(3))
        engine.step(ImageText(student, Contrastive()), [batch], Rates(1e-2, 0.1))
    return {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}, engine


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_locked_text_tuning_as_vitamins(source: str, optimizer: str) -> None:
    """A hybrid tower learns to meet a text tower that does not move."""
    student = ClipStudent(clip_settings("vitamin_of_tests", lock_text=True, text={"init_from": source}))
    assert sum(p.numel() for p in student.model.text.parameters() if p.requires_grad) == 0
    changed, engine = moved(student, optimizer=optimizer)
    names = {name for name, _ in student.named_parameters()}
    assert changed == {name for name in names if not name.startswith("model.text.")}
    held = {id(parameter) for parameter in engine._watched.state}
    assert held == {id(parameter) for name, parameter in student.named_parameters() if name in changed}
    origin = load_file(Path(source) / "open_clip_model.safetensors")
    for name, value in student.model.text.state_dict().items():
        assert torch.equal(value, origin[f"text.{name}"]), name
    assert all(parameter.grad is None for parameter in student.model.text.parameters())


def test_locked_batch_norms_do_not_move() -> None:
    student = ClipStudent(clip_settings("convnet_nano_32", lock_image=True))
    changed, _ = moved(student)
    assert {name for name in changed if "visual" in name} == {"model.visual.head.proj.weight"}
    images, _ = pairs(9)
    torch.nn.init.normal_(student.trunk.stem.bn.running_mean)  # type: ignore[union-attr, arg-type]
    with torch.no_grad():
        assert torch.equal(student.train().encode_image(images), student.eval().encode_image(images))

    partly = ClipStudent(clip_settings("convnet_nano_32", lock_image=True, image_unlocked_groups=1))
    changed, _ = moved(partly)
    statistics = {name.removeprefix("model.visual.trunk.") for name in changed if name.endswith("running_mean")}
    assert statistics
    assert all(name.startswith("stages.2.1.") for name in statistics)
    free, _ = moved(ClipStudent(clip_settings("convnet_nano_32")))
    assert "model.visual.trunk.stem.bn.running_var" in free


def kept_for_backward(run: Any) -> int:
    """Bytes that autograd keeps."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(kept.values())


def test_a_locked_tower_keeps_nothing_for_the_backward_pass(source: str) -> None:
    images, texts = pairs(0)
    free = ClipStudent(clip_settings(text={"init_from": source})).train()
    locked = ClipStudent(clip_settings(lock_text=True, lock_image=True, text={"init_from": source})).train()
    assert kept_for_backward(lambda: free.encode_text(texts)) > 0
    assert kept_for_backward(lambda: locked.encode_text(texts)) == 0
    assert kept_for_backward(lambda: locked.trunk(images.float())) == 0
    assert locked.encode_image(images).requires_grad
    assert torch.equal(locked.encode_text(texts), locked.eval().encode_text(texts))


def test_mistakes_are_named(source: str) -> None:
    with pytest.raises(UserError, match=r"student\.lock_text=true needs a trained text tower"):
        ClipStudent(clip_settings(lock_text=True))
    with pytest.raises(UserError, match=r"student\.image_unlocked_groups=3 leaves nothing locked"):
        ClipStudent(clip_settings(lock_image=True, image_unlocked_groups=3))
    with pytest.raises(UserError, match=r"student\.text_unlocked_groups=4 leaves nothing locked"):
        ClipStudent(clip_settings(lock_text=True, text_unlocked_groups=4, text={"init_from": source}))
    with pytest.raises(ValueError, match=r"student\.text_unlocked_groups=1 needs student\.lock_text=true"):
        clip_settings(text_unlocked_groups=1)
    with pytest.raises(ValueError, match=r"student\.text\.projection=new would never train"):
        clip_settings(lock_text=True, text={"init_from": source, "projection": "new"})
    with pytest.raises(UserError, match=r"student\.embed_dim=16: the projection of .* is \[8, 12\]"):
        ClipStudent(clip_settings(lock_text=True, embed_dim=16, text={"init_from": source}))


@pytest.mark.slow
def test_sharded_runs_with_locked_parameters_follow_the_local_one(tmp_path: Path) -> None:
    """Text locked, the image tower's last group and its projection train."""
    path = write_recipe(tmp_path, CLIP)
    run("clip", path, tmp_path / "parent", "run.epochs=1")
    student = {"name": "vit_nano_patch4_24", "embed_dim": 32, "lock_image": True, "image_unlocked_groups": 1, "lock_text": True,
               "text": {"init_from": str(tmp_path / "parent")}}  # fmt: skip
    tree = CLIP | {"student": student, "init_from": str(tmp_path / "parent"), "run": CLIP["run"] | {"epochs": 1}}
    path = write_recipe(tmp_path, tree, "locked.yaml")
    run("clip", path, tmp_path / "local")
    parent = load_file(tmp_path / "parent" / "open_clip_model.safetensors")
    for stage in (1, 3):  # ZeRO 2 cuts as ZeRO 1 does, and ZeRO 0 is the plain module
        out = tmp_path / f"zero{stage}"
        run("clip", path, out, "run.engine=deepspeed", f"run.zero_stage={stage}", processes=2)
        assert losses(out) == pytest.approx(losses(tmp_path / "local"), abs=2e-5), stage
        weights = load_file(out / "open_clip_model.safetensors")
        same = {name for name, value in weights.items() if torch.equal(value, parent[name])}
        assert same >= {name for name in weights if name.startswith(("text.", "visual.trunk.blocks.2", "visual.trunk.pos_embed"))}
        assert not same & {name for name in weights if name.startswith(("visual.trunk.blocks.3.", "visual.head.", "logit_scale"))}
    assert json.loads((tmp_path / "local" / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]["width"] == 32
