"""Checkpoints of other people's training code: models below prefixes and in containers, and values that are no numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from eva_mim.commands.inspect import inspect
from eva_mim.core.errors import UserError
from eva_mim.core.run_folder import RunFolder
from eva_mim.evaluate.counts import hits
from eva_mim.run.state import state_of
from eva_mim.weights import HandOverSettings
from eva_mim.weights.handover import read_parent, seed_trunk
from eva_mim.weights.names.translate import read_source
from finetune.classify import StageRecipe
from tests.tiny import CLASSIFY, MIM, run, write_recipe
from tests.weights.test_handover import CLASSES, seed, trunk, write_stage

NANO, CONVNET = "vit_nano_patch4_32", "convnet_nano_32"
HEAD = {"head.mlp.0.weight": torch.ones(3, 3), "head.last_layer.weight_g": torch.ones(3, 1)}
"""Of a head for self-distillation, which is no part of a trunk."""


def wrapped(model: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value.contiguous() for name, value in model.state_dict().items()}


def seeded(path: Path, name: str, container: str | None = None) -> tuple[dict[str, Tensor], list[str]]:
    """A trunk that started from a file, and the names that were ignored."""
    child, settings = trunk(9, name), HandOverSettings(container=container)
    report = seed_trunk(child, read_parent(path, settings), settings)
    return child.state_dict(), report.ignored


def same(found: dict[str, Tensor], model: nn.Module) -> bool:
    wanted = model.state_dict()
    return found.keys() == wanted.keys() and all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("name", [NANO, CONVNET])
@pytest.mark.parametrize("prefix", [
    "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "backbone.", "model.", "model.backbone.", "module.student.backbone.",
    "net."])
def test_prefixes_are_taken_off(tmp_path: Path, name: str, prefix: str) -> None:
    parent = trunk(1, name)
    torch.save({"state_dict": wrapped(parent, prefix), "epoch": 3}, tmp_path / "a.pt")
    save_file(wrapped(parent, prefix), tmp_path / "b.safetensors")
    for file in ("a.pt", "b.safetensors"):
        found, ignored = seeded(tmp_path / file, name)
        assert same(found, parent)
        assert ignored == []


@pytest.mark.parametrize("name", [NANO, CONVNET])
def test_a_head_beside_the_backbone_is_ignored_by_name(tmp_path: Path, name: str) -> None:
    parent = trunk(1, name)
    torch.save({"teacher": wrapped(parent, "module.backbone.") | {f"module.{n}": v for n, v in HEAD.items()}}, tmp_path / "a.pt")
    found, ignored = seeded(tmp_path / "a.pt", name)
    assert same(found, parent)
    assert sorted(ignored) == sorted(HEAD)
    source = read_source(tmp_path / "a.pt")
    assert source.report.reasons["head.mlp.0.weight"] == "beside the model below backbone."


def test_of_several_models_one_is_chosen(tmp_path: Path) -> None:
    """In containers of a torch file, and by prefixes in any file."""
    models = {"student": trunk(1), "teacher": trunk(2)}
    torch.save({who: wrapped(model, "backbone.") | HEAD for who, model in models.items()}, tmp_path / "parts.pt")
    flat = {name: value for who, model in models.items() for name, value in wrapped(model, f"{who}.backbone.").items()}
    save_file(flat, tmp_path / "flat.safetensors")
    torch.save(flat, tmp_path / "flat.pt")
    with pytest.raises(UserError, match=r"which part shall be read\? It holds tensors in: 'student', 'teacher'"):
        seeded(tmp_path / "parts.pt", NANO)
    for file in ("parts.pt", "flat.safetensors", "flat.pt"):
        for who, model in models.items():
            assert same(seeded(tmp_path / file, NANO, who)[0], model)
        with pytest.raises(UserError, match="no container 'somebody'"):
            seeded(tmp_path / file, NANO, "somebody")
    with pytest.raises(UserError, match=r"a model below each of 'student.backbone.', 'teacher.backbone.'; choose one .*"
                                        r"\(hand_over.container=student.backbone\)"):
        seeded(tmp_path / "flat.pt", NANO)
    assert same(seeded(tmp_path / "flat.pt", NANO, "student.backbone")[0], models["student"])  # as the message says


def test_a_stage_starts_from_one_of_two_models(tmp_path: Path) -> None:
    """Its parent is hashed where it is read."""
    torch.save({"student": trunk(1).state_dict(), "teacher": trunk(2).state_dict()}, tmp_path / "two.pt")
    recipe = StageRecipe.model_validate(
        CLASSIFY | {"init_from": str(tmp_path / "two.pt"), "hand_over": {"container": "teacher"}})
    assert len(state_of("classify", recipe, tmp_path / "out").identity.parents["init_from"]["sha256"]) == 64


def test_what_is_ours_keeps_its_names(tmp_path: Path) -> None:
    """The checkpoint of a CLIP stage has "model." before its names, which is its scheme."""
    inner = {f"model.visual.trunk.{name}": value.contiguous() for name, value in trunk(3).state_dict().items()}
    save_file(inner, tmp_path / "clip.safetensors")
    assert read_source(tmp_path / "clip.safetensors").scheme == "stage"
    assert same(seeded(tmp_path / "clip.safetensors", NANO)[0], trunk(3))


def test_inspect_sees_through_the_prefix(tmp_path: Path) -> None:
    save_file(wrapped(trunk(1), "_orig_mod.backbone."), tmp_path / "a.safetensors")
    found = inspect(tmp_path / "a.safetensors")
    assert found["family"]["depth"] == 4
    assert found["prefix"] == "_orig_mod.backbone."


# ---- values that are no numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["blocks.0.mlp.fc1.weight", "pos_embed", "head.weight"])
def test_a_parent_with_nan_is_refused(tmp_path: Path, name: str, value: float) -> None:
    parent = trunk(1, num_classes=3)
    parent.state_dict()[name].flatten()[5:7] = value
    folder = write_stage(tmp_path / "parent", parent, classes=CLASSES, grid=[8, 8])
    child = trunk(2, num_classes=3, image_size=64 if name == "pos_embed" else None)  # positions are resized first
    with pytest.raises(UserError, match=rf"init_from: .*parent: \d+ of the \d+ values of {name} are NaN or infinite"):
        seed(child, folder, CLASSES)


def test_so_is_a_teacher_with_nan(tmp_path: Path) -> None:
    weights = trunk(1, NANO, image_size=16).state_dict()
    weights["norm.bias"][3] = float("nan")
    torch.save(weights, tmp_path / "teacher.pt")
    tree = MIM | {"teacher": MIM["teacher"] | {"weights": str(tmp_path / "teacher.pt")}}
    done = run("mim", write_recipe(tmp_path, tree), tmp_path / "out", code=2)
    assert "error: teacher: its weights: 1 of the 96 values of norm.bias are NaN or infinite" in done.stderr


def test_nan_is_no_right_answer() -> None:
    """The largest of scores that are all NaN is the first one, which is right for a class of the images."""
    scores = torch.tensor([[float("nan")] * 6, [0.0, 1.0, 0.0, 0.0, 0.0, 0.0], [5.0, float("nan"), 0.0, 0.0, 0.0, 0.0]])
    first, five = hits(scores, torch.tensor([[0], [1], [0]]))
    assert first.tolist() == [False, True, False]
    assert five.tolist() == [False, True, False]
    both = torch.stack([scores, torch.eye(6)[:3]], dim=2)  # of two classifiers
    assert hits(both, torch.tensor([[0], [1], [0]]))[0].tolist() == [[False, True], [True, True], [False, False]]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_ends_in_nan_exports_nothing(tmp_path: Path, processes: int) -> None:
    """Weights of 10^30 are numbers; what they compute is none. Fewer steps are left than would start a rewind."""
    settings = ["optim.lr=1e30", "optim.warmup_epochs=0", "run.epochs=1", *(["run.engine=deepspeed"] if processes > 1 else [])]
    out = tmp_path / "out"
    done = run("classify", write_recipe(tmp_path, CLASSIFY), out, *settings, processes=processes, code=3)
    assert "the last 3 steps had no finite gradient and changed nothing" in done.stderr
    assert "diverged: after the last step the held-out figures loss are not finite; nothing is exported" in done.stderr
    assert not (out / "model.safetensors").exists()
    assert not RunFolder(out).record()["finished"]
