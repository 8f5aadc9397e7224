"""What is asked of a timm model, against what timm's own models of five kinds do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from eva_mim.trunks import TrunkSettings, facts
from eva_mim.trunks.create import create
from eva_mim.trunks.kernels import tune

MODELS = ["vit_nano_patch4_32", "vit_small_patch14_reg4_dinov2", "convnet_nano_32", "vit_tiny_r_s16_p8_224",
          "swin_tiny_patch4_window7_224"]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_facts_are_what_the_model_does(name: str) -> None:
    trunk: Any = create(name, num_classes=3).eval()
    height, width = facts.input_size(trunk)
    assert (3, height, width) == tuple(trunk.pretrained_cfg["input_size"])
    assert facts.image_size(trunk, TrunkSettings(name=name)) == width
    assert facts.mean_std(trunk) == (trunk.pretrained_cfg["mean"], trunk.pretrained_cfg["std"])
    settings = TrunkSettings(name=name, mean=(0.5,) * 3, std=(0.25,) * 3)
    assert facts.mean_std(trunk, settings) == ((0.5,) * 3, (0.25,) * 3)
    assert trunk.get_submodule(facts.head_name(trunk)) is trunk.get_classifier()
    assert facts.has_tokens(trunk) == name.startswith("vit")
    grid, blocks = facts.grid(trunk), facts.plain_blocks(trunk)
    assert (blocks is not None) == facts.has_tokens(trunk)
    if facts.has_tokens(trunk):
        assert grid is not None
        tokens = trunk.forward_features(torch.zeros(1, 3, height, width))
        assert tokens.shape[1] == facts.prefix_tokens(trunk) + grid[0] * grid[1]
    else:
        assert facts.prefix_tokens(trunk) == 0
    if name.startswith("vit_small"):
        assert facts.patch_size(trunk) == (14, 14)
        assert facts.prefix_tokens(trunk) == 5


def test_a_trunk_without_head_names_none() -> None:
    assert facts.head_name(create("vit_nano_patch4_32", num_classes=0)) in (None, "head")
    assert facts.configuration(nn.Linear(1, 1)) == {}


@pytest.mark.parametrize(("device", "fused"), [("cpu", False), ("cuda", True)])
def test_attention_is_fused_on_cuda_alone(device: str, fused: bool) -> None:
    model = create("vit_nano_patch4_32")
    tune(model, device)
    assert {layer.fused_attn for layer in model.modules() if hasattr(layer, "fused_attn")} == {fused}
