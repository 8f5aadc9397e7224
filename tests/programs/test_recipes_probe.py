"""Recipes of linear probes against what is published of EVA-CLIP's: table 4.4 of facts/eva.md, and the logs in EVA-01/logs/cls of
github.com/baaivision/EVA, commit 5623d08."""

from __future__ import annotations

import pytest
from torch import nn

from eva_mim.data.sampler import GlobalOrder
from finetune.probe import STAGE, StageRecipe
from tests.programs.test_recipes_classify import CONFIGS, IN_1K, differing, header, mean_rate, parent_shapes, read, shapes

PROBES = {"eva01_clip_g_224": (224, 1.0, "86.462 %"), "eva01_clip_g_336": (336, 0.6, "86.498 %")}
"""Pixels, learning rate, figure."""
LOGS = {  # {epoch: mean learning rate}
    "eva01_clip_g_224": {0: 0.04943679599499374, 1: 0.14956195244055073, 44: 0.6072675487767878,
                         89: 0.00013091986441949032},
    "eva01_clip_g_336": {0: 0.02966207759699625, 44: 0.36436052926607276, 89: 7.85519186516942e-5},
}  # fmt: skip


def test_every_published_probe_has_its_recipe_and_its_figure() -> None:
    assert {path.stem for path in (CONFIGS / "probe").glob("eva*.yaml")} == PROBES.keys() == LOGS.keys()
    for name, (_, _, figure) in PROBES.items():
        assert figure in header(f"probe/{name}"), name


@pytest.mark.parametrize("name", PROBES)
def test_a_published_probe(name: str) -> None:
    recipe, (pixels, lr, _) = read(f"probe/{name}"), PROBES[name]
    assert isinstance(recipe, StageRecipe)
    assert (recipe.run.global_batch, recipe.run.micro_batch, recipe.run.epochs) == (40 * 400, 400, 90)
    assert (recipe.data.expected, recipe.run.zero_stage, recipe.run.precision) == (IN_1K, 0, "fp16")
    assert GlobalOrder(IN_1K, seed=0, global_batch=16000, micro_batch=400).steps_per_epoch == 80
    optim = recipe.optim
    assert (optim.optimizer, optim.lars.momentum, optim.lars.trust) == ("lars", 0.9, 0.001)
    assert (optim.lr, optim.min_lr, optim.warmup_epochs, optim.warmup) == (lr, 0.0, 10, "inclusive")
    assert (optim.weight_decay, optim.clip_grad, optim.layer_decay) == (0.0, None, 1.0)
    assert (recipe.mix.smoothing, recipe.view.randaugment, recipe.view.flip) == (0.0, None, 0.5)
    assert (recipe.view.crop_scale, recipe.view.crop_pct) == ((0.08, 1.0), 1.0)
    assert (recipe.probe.cached, recipe.lrs) == (False, (lr,))
    student = STAGE.on_meta(recipe).student
    assert sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad) == 1_409_000
    assert (student.image_size, student.trunk.global_pool) == (pixels, "token")
    assert isinstance(student.trunk.norm, nn.LayerNorm)
    assert isinstance(student.trunk.fc_norm, nn.Identity)
    differs = differing(shapes(student.trunk), parent_shapes(str(recipe.init_from).removeprefix("runs/")))
    assert differs - {"pos_embed"} <= {"head.weight", "head.bias"}  # the final norm is part of the features
    assert ("pos_embed" in differs) == (recipe.hand_over.positions == "original") == (pixels != 224)


@pytest.mark.parametrize("name", LOGS)
def test_epoch_means_are_those_of_the_original_logs(name: str) -> None:
    for epoch, logged in LOGS[name].items():
        assert mean_rate(f"probe/{name}", 80, epoch) == pytest.approx(logged, rel=1e-12), epoch


@pytest.mark.parametrize("name", ["imagenet_sweep", "own_images"])
def test_a_sweep_of_probes(name: str) -> None:
    recipe = read(f"probe/{name}")
    assert isinstance(recipe, StageRecipe)
    assert recipe.probe.cached
    assert len(recipe.lrs) == 5
    assert min(recipe.lrs) < recipe.optim.lr < max(recipe.lrs)
