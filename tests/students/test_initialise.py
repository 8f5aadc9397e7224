"""The laws of initialisation against closed forms, and the published sizes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eva_mim.core.errors import UserError
from eva_mim.data.view_settings import MaskSettings
from eva_mim.students import DecoderSettings, InitSettings, MaskedSettings
from eva_mim.students.initialise import initialise
from eva_mim.students.masked import MaskedStudent
from eva_mim.trunks.meta import meta_device
from eva_mim.trunks.positions import sincos_table
from tests.students.test_masked import randomise

CUT = math.sqrt(1 - 2 * math.exp(-0.5) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(0.5)))
"""Standard deviation of a standard normal cut at +-1: 0.5396."""


def drawn(name: str, law: Any, std: float = 0.02, **options: Any) -> Any:
    """A student whose every parameter was moved before its law was applied."""
    settings = MaskedSettings(
        name=name, init=InitSettings(law=law, std=std), decoder=DecoderSettings(width=64, depth=2, heads=4), **options
    )
    torch.manual_seed(3)
    made = MaskedStudent(settings, 64, MaskSettings(kind="random", ratio=0.5))
    initialise(randomise(made), settings.init)
    return made


def spread(tensor: Tensor) -> float:
    """Standard deviation about 0."""
    return tensor.detach().double().square().mean().sqrt().item()


def xavier(layer: nn.Linear) -> float:
    """Its standard deviation."""
    return math.sqrt(2 / (layer.in_features + layer.out_features))


def layers(made: MaskedStudent, kind: type[nn.Module]) -> dict[str, Any]:
    return {name: module for name, module in made.named_modules() if isinstance(module, kind)}


def check_norms_and_biases(made: MaskedStudent) -> None:
    for norm in layers(made, nn.LayerNorm).values():
        assert (norm.weight == 1).all()
        assert (norm.bias == 0).all()
    for linear in layers(made, nn.Linear).values():
        assert linear.bias is None or (linear.bias == 0).all()


def test_the_closed_form_of_the_cut() -> None:
    assert pytest.approx(0.5396, abs=1e-4) == CUT


@pytest.mark.parametrize("name", ["golden_eva01_mim", "vit_mini_patch4_32"])
def test_eva01(name: str) -> None:
    """0.015 cut at 0.015 everywhere; attn.proj and mlp.fc2 of block l divided by sqrt(2 l)."""
    made = drawn(name, "eva01", std=0.015)
    check_norms_and_biases(made)
    for key, layer in {**layers(made, nn.Linear), **layers(made, nn.Conv2d)}.items():
        number = int(key.split(".")[2]) + 1 if key.endswith(("attn.proj", "mlp.fc2")) else 0.5
        scale = 0.015 / math.sqrt(2 * number)
        assert spread(layer.weight) == pytest.approx(CUT * scale, rel=0.03), key
        assert 0.99 * scale < layer.weight.abs().max() <= scale * 1.000001, key
        assert layer.bias is None or (layer.bias == 0).all()
    for token, tolerance in ((made.mask_token, 0.25), (made.trunk.cls_token, 0.25), (made.trunk.pos_embed, 0.03)):
        assert spread(token) == pytest.approx(CUT * 0.015, rel=tolerance)
        assert token.abs().max() <= 0.015


def test_eva02_with_sub_norm() -> None:
    """Xavier normal; MLP, v and output projection times sqrt(ln(2 depth)) = sqrt(ln 4); q, k and the head are not."""
    made = drawn("golden_eva02_b_mim", "eva02")
    check_norms_and_biases(made)
    grown = 0
    for key, layer in layers(made, nn.Linear).items():
        factor = math.sqrt(math.log(4)) if "mlp." in key or key.endswith(("attn.proj", "v_proj")) else 1.0
        grown += factor > 1
        assert spread(layer.weight) == pytest.approx(factor * xavier(layer), rel=0.03), key
        assert layer.weight.abs().max() > 1.2 * math.sqrt(3) * factor * xavier(layer), key  # beyond the uniform law's bound
    assert grown == 2 * 5
    for token in (made.mask_token, made.trunk.cls_token):
        assert spread(token) == pytest.approx(CUT * 0.02, rel=0.25)
    assert spread(made.trunk.pos_embed) == pytest.approx(CUT * 0.02, rel=0.03)
    assert made.trunk.pos_embed.abs().max() <= 0.02


def test_eva02_without_sub_norm_grows_nothing() -> None:
    made = drawn("golden_eva02_s_mim", "eva02")
    for key, layer in layers(made, nn.Linear).items():
        assert spread(layer.weight) == pytest.approx(xavier(layer), rel=0.03), key


@pytest.mark.parametrize("law", ["eva02", "mae"])
def test_the_patch_kernel_is_drawn_as_a_linear_layer(law: Any) -> None:
    """Uniform within sqrt(6 / (588 + 96)); the bias is what it was."""
    torch.manual_seed(3)
    settings = MaskedSettings(name="golden_eva02_b_mim")
    made: Any = MaskedStudent(settings, 64, MaskSettings())
    before = made.trunk.patch_embed.proj.bias.clone()
    initialise(made, InitSettings(law=law))
    kernel, bound = made.trunk.patch_embed.proj.weight, math.sqrt(6 / (3 * 14 * 14 + 96))
    assert 0.999 * bound < kernel.abs().max() <= bound
    assert spread(kernel) == pytest.approx(bound / math.sqrt(3), rel=0.01)
    assert torch.equal(made.trunk.patch_embed.proj.bias, before)
    assert before.abs().max() > 0


def test_mae_with_its_decoder_and_fixed_positions() -> None:
    made = drawn("vit_mini_patch4_32", "mae", form="visible", positions="sincos")
    check_norms_and_biases(made)
    assert {"decoder_embed", "head", "decoder_blocks.1.attn.qkv", "trunk.blocks.5.mlp.fc2"} <= layers(made, nn.Linear).keys()
    for key, layer in layers(made, nn.Linear).items():
        bound = math.sqrt(3) * xavier(layer)
        assert 0.99 * bound < layer.weight.abs().max() <= bound, key
        assert spread(layer.weight) == pytest.approx(bound / math.sqrt(3), rel=0.03), key
    tokens = torch.cat([made.mask_token.flatten(), made.trunk.cls_token.flatten()])
    assert spread(tokens) == pytest.approx(0.02, rel=0.2)
    assert tokens.abs().max() > 0.04  # not cut
    assert torch.equal(made.trunk.pos_embed, sincos_table((8, 8), 128, 1))


def test_timms_own_start_is_left_alone() -> None:
    torch.manual_seed(0)
    made: Any = MaskedStudent(MaskedSettings(name="golden_eva01_relpos"), 64, MaskSettings())
    before, generator = {key: value.clone() for key, value in made.state_dict().items()}, torch.get_rng_state()
    initialise(made, InitSettings())
    assert all(torch.equal(value, before[key]) for key, value in made.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("law", ["eva01", "eva02", "mae"])
def test_layer_scale_relative_tables_and_query_biases_keep_their_start(law: Any) -> None:
    made: Any = MaskedStudent(MaskedSettings(name="golden_eva01_relpos"), 64, MaskSettings())
    initialise(made, InitSettings(law=law))
    block = made.trunk.blocks[1]
    assert (block.gamma_1 == 0.1).all()
    assert (block.gamma_2 == 0.1).all()
    for start in (block.attn.q_bias, block.attn.v_bias, made.trunk.rel_pos_bias.relative_position_bias_table):
        assert (start == 0).all()


def test_the_seed_decides_and_a_frozen_patch_embedding_is_drawn_too() -> None:
    first, again = (drawn("vit_nano_patch4_32", "eva01", patch_grad_scale=0.0) for _ in range(2))
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in first.state_dict().items())
    kernel = first.trunk.patch_embed.proj
    assert not kernel.weight.requires_grad
    assert (kernel.bias == 0).all()
    assert spread(kernel.weight) == pytest.approx(CUT * 0.02, rel=0.03)


def test_blocks_of_an_unknown_kind_are_refused() -> None:
    settings = MaskedSettings(name="vit_small_patch16_18x2_224")
    with meta_device():
        made = MaskedStudent(settings, 64, MaskSettings())
    with pytest.raises(UserError, match=r"student\.init\.law: .*ParallelThingsBlock.* set it to timm or mae"):
        initialise(made, InitSettings(law="eva01"))


@pytest.mark.parametrize(
    ("name", "target_width", "law", "trained"),
    [("eva_giant_patch14_224", 768, "eva01", 1_012_229_632), ("eva02_tiny_patch14_224", 1024, "eva02", 5_699_968),
     ("eva02_small_patch14_224", 1024, "eva02", 22_015_744), ("eva02_base_patch14_224", 1024, "eva02", 86_546_944),
     ("eva02_large_patch14_224", 1024, "eva02", 304_319_424), ("eva_large_patch14_196", 1024, "mae", 316_576_768)],
)
def test_sizes_are_the_published_ones(name: str, target_width: int, law: Any, trained: int) -> None:
    """Trained parameters with mask token and head: EVA's logs and tables. Nothing is allocated."""
    mae: dict[str, Any] = {"form": "visible", "positions": "sincos", "image_size": 224} if law == "mae" else {}
    settings = MaskedSettings(name=name, init=InitSettings(law=law), **mae)
    with meta_device():
        made: Any = MaskedStudent(settings, target_width, MaskSettings(kind="random", ratio=0.75))
    initialise(made, settings.init)
    assert sum(parameter.numel() for parameter in made.parameters() if parameter.requires_grad) == trained
    assert made.grid == (16, 16)
    assert {made.trunk.norm.eps, made.trunk.blocks[0].norm1.eps} == {1e-6}
