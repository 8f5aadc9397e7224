"""Hybrids and convolutional trunks as masked students: they learn, timm opens them, and later stages start from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models import generate_default_cfgs, register_model

import eva_mim
import eva_mim.trunks.small
from eva_mim import cli
from eva_mim.trunks.positions import sincos_table
from tests.ranks import pool
from tests.tiny import CLASSIFY, CLIP, MIM, records, run, write_recipe

default_cfgs = generate_default_cfgs({"blind_hybrid.none": dict(eva_mim.trunks.small._PIXELS)})


@register_model
def blind_hybrid(pretrained: bool = False, **options: Any) -> Any:
    """A hybrid without positions, as ViTamin-XL is one."""
    return eva_mim.trunks.small._vitamin("blind_hybrid", 32, 1, pretrained, {"pos_embed": "none"} | options)


def command(*words: str) -> int:
    """A command of eva-mim, in a process that knows this file's architecture."""
    return cli.main(list(words))


def said(*words: str | Path) -> tuple[int, str]:
    """Exit code and messages of a command."""
    outcome, = pool(1)(command, *map(str, words))
    return outcome.value, outcome.out + outcome.err

STUDENTS = [("vitamin_nano_32", "masked_conv"), ("vitamin_nano_32", "pixel_fill"), ("convnet_nano_32", "pixel_fill")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "form"), STUDENTS)
def test_a_student_of_convolutions(name: str, form: str, tmp_path: Path) -> None:
    tree = MIM | {"student": {"name": name, "form": form}, "teacher": MIM["teacher"] | {"image_size": 32}}
    out = tmp_path / "mim"
    run("mim", write_recipe(tmp_path, tree), out)
    found = records(out)
    assert found[-1]["loss"] < found[0]["loss"] - 0.2
    trunk = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=0).eval()
    assert trunk.num_features == {"vitamin_nano_32": 96, "convnet_nano_32": 128}[name]
    model, images = eva_mim.load(out), torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(part).view(-1, 1, 1) for part in (model.mean, model.std))
    with torch.no_grad():
        features = trunk.forward_features((images - mean) / std)
        tokens = features.flatten(2).transpose(1, 2) if features.ndim == 4 else features
        said = model(images)
    assert tokens.shape[1] == 64
    assert (said.spatial - tokens).abs().max() < 1e-5  # type: ignore[union-attr]
    assert (said.summary - tokens.mean(1)).abs().max() < 1e-5  # type: ignore[union-attr]
    stages = {"classify": CLASSIFY | {"student": {"name": name}}}
    if form == "pixel_fill":
        stages["clip"] = CLIP | {"student": CLIP["student"] | {"name": name}}
    for stage, tree in stages.items():
        recipe = write_recipe(tmp_path, tree | {"init_from": str(out)})
        run(stage, recipe, tmp_path / stage, "run.epochs=1", "optim.layer_decay=1.0")
        loaded = [key.removeprefix("trunk.") for key in
                  json.loads((tmp_path / stage / "lineage.json").read_text())["seeded"]["loaded"]]
        assert {key.replace("fc_norm", "norm") for key in loaded} == set(trunk.state_dict())  # it pools before the norm


@pytest.mark.slow
def test_a_trunk_without_positions_gets_fixed_ones(tmp_path: Path) -> None:
    """Refused with masks, unless positions are asked for: they are in the folder, which timm opens by its own keyword, in the
    classifier that starts from it, and never trained. A clip stage, whose model is open_clip's, cannot have them."""
    student = {"name": "blind_hybrid", "form": "pixel_fill"}
    tree = MIM | {"student": student, "teacher": MIM["teacher"] | {"image_size": 32}}
    out, recipe = tmp_path / "mim", write_recipe(tmp_path, tree)
    code, text = said("mim", recipe, "--out", out)
    assert code == 2
    assert "blind_hybrid has no positions, so that it would predict the same for every masked patch" in text
    assert "set student.positions=sincos, or mask.ratio=0" in text
    code, text = said("mim", recipe, "student.positions=sincos", "--out", out)
    assert code == 0, text
    found = records(out)
    assert found[-1]["loss"] < found[0]["loss"] - 0.2
    table = sincos_table((8, 8), 96, 0)
    assert torch.equal(load_file(out / "model.safetensors")["pos_embed"], table)
    trunk = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=0).eval()
    model, images = eva_mim.load(out), torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(part).view(-1, 1, 1) for part in (model.mean, model.std))
    with torch.no_grad():
        ours: Any = model(images)
        assert (ours.spatial - trunk.forward_features((images - mean) / std)).abs().max() < 1e-5
    recipe = write_recipe(tmp_path, CLASSIFY | {"student": {"name": "blind_hybrid"}, "init_from": str(out)}, "classify.yaml")
    code, text = said("classify", recipe, "--out", tmp_path / "classify")
    assert code == 2
    assert "pos_embed: [1, 64, 96] in the checkpoint, not here" in text
    assert "student.positions=sincos" in text
    code, text = said("classify", recipe, "student.positions=sincos", "run.epochs=1", "--out", tmp_path / "classify")
    assert code == 0, text
    assert torch.equal(load_file(tmp_path / "classify" / "model.safetensors")["pos_embed"], table)
    tree = CLIP | {"student": CLIP["student"] | {"name": "blind_hybrid"}, "init_from": str(out)}
    code, text = said("clip", write_recipe(tmp_path, tree, "clip.yaml"), "student.positions=sincos", "--out", tmp_path / "clip")
    assert code == 2
    assert "student.positions=sincos: a clip stage's tower is open_clip's, with the positions of its architecture or none" in text
    code, text = said("clip", tmp_path / "clip.yaml", "--out", tmp_path / "clip")
    assert code == 2
    assert "pos_embed: [1, 64, 96] in the checkpoint, not here" in text
    for target, place in (("open_clip", "x.safetensors"), ("timm", "x.safetensors"), ("hf", "x")):
        code, text = said("convert", out, tmp_path / place, "--to", target)
        assert code == 2
        assert "its model has no positions at timm's or open_clip's, and student.positions=sincos gave it some" in text
