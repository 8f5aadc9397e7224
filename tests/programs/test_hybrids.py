"""Hybrids and convolutional trunks as masked students: they learn, timm opens them, and later stages start from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch

import eva_mim
import eva_mim.trunks.small
from tests.tiny import CLASSIFY, CLIP, MIM, records, run, write_recipe

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
