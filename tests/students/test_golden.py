"""Students against tensors that the original code computed: tokens, predictions, losses, gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from timm.models.eva import checkpoint_filter_fn
from torch import Tensor
from torch.nn.functional import cosine_similarity

from eva_mim.data.view_settings import MaskSettings
from eva_mim.students import ClassifierSettings, DecoderSettings, MaskedSettings
from eva_mim.students.classifier import Classifier
from eva_mim.students.masked import MaskedStudent
from tests.students.golden import below, close, load, pixels


def flat_index(masked: Tensor) -> Tensor:
    return masked.flatten().nonzero()[:, 0]


@pytest.mark.parametrize("name", ["eva01_mim", "eva02_s_mim", "eva02_b_mim"])
def test_eva_models_predict_and_learn_as_the_original_code(shared: Path, name: str) -> None:
    """stop_grad_conv1 is patch_grad_scale 0.1, and of the three stored gradients only the patch kernel's has that factor."""
    golden, facts = load(shared, name)
    state = below(golden, "state_dict/")
    scale = 0.1 if facts["constructor"].get("stop_grad_conv1") else 1.0
    made = MaskedStudent(MaskedSettings(name=f"golden_{name}", patch_grad_scale=scale), 64).eval()
    renamed = checkpoint_filter_fn({"module": state}, made.trunk)  # it also moves norm to fc_norm: moved back here
    made.trunk.load_state_dict({key.replace("fc_norm.", "norm."): value for key, value in renamed.items()})
    made.mask_token.data.copy_(state["mask_token"])
    made.head.load_state_dict(below(state, "lm_head."))
    images, masked = pixels(golden["in/image"]), golden["in/mask"].flatten(1)
    assert (made.tokens(images, masked) - golden["out/final_norm_tokens"]).abs().max() < 2e-5
    prediction = made(images, masked, flat_index(masked))
    assert (prediction - golden["out/predictions"]).abs().max() < 1e-5
    loss = -cosine_similarity(prediction, golden["in/teacher_features"][masked], dim=-1).mean()
    assert loss.item() == pytest.approx(facts["loss"], abs=1e-6)
    loss.backward()
    attention = made.trunk.blocks[0].attn
    bias = attention.q_bias if attention.q_bias is not None else attention.q_proj.bias
    assert close(made.trunk.patch_embed.proj.weight.grad, golden["grad/patch_embed.proj.weight"], 2e-5)
    assert close(bias.grad, golden["grad/blocks.0.attn.q_bias"], 2e-5)
    assert close(made.head.weight.grad, golden["grad/lm_head.weight"], 2e-5)


@torch.no_grad()
def test_relative_positions_and_layer_scale_are_the_original_ones(shared: Path) -> None:
    golden, _ = load(shared, "eva01_relpos")
    state = below(golden, "state_dict/")
    made = MaskedStudent(MaskedSettings(name="golden_eva01_relpos"), 20).eval()
    own = ("mask_token", "lm_head.", "rel_pos_bias.relative_position_index")
    made.trunk.load_state_dict({key: value for key, value in state.items() if not key.startswith(own)})
    made.mask_token.copy_(state["mask_token"])
    made.head.load_state_dict(below(state, "lm_head."))
    images, masked = pixels(golden["in/image"]), golden["in/mask"].flatten(1)
    assert (made.tokens(images, masked) - golden["out/final_norm_tokens"]).abs().max() < 2e-5
    assert (made(images, masked, flat_index(masked)) - golden["out/predictions"]).abs().max() < 1e-5


@torch.no_grad()
def test_the_classifier_with_a_table_in_each_block_is_the_original_one(shared: Path) -> None:
    """From the state after the original loader: shared table copied to both blocks and resized to a 12x12 grid."""
    golden, _ = load(shared, "eva01_relpos")
    made = Classifier(ClassifierSettings(name="golden_eva01_relpos_cls", image_size=168, global_pool="avg"), 15).eval()
    state = below(golden, "finetune/")
    made.trunk.load_state_dict({key: value for key, value in state.items() if not key.endswith("_index")})
    images = pixels(golden["in/finetune_image"])
    assert (made(images) - golden["out/finetune_logits"]).abs().max() < 1e-5


def large(golden: dict[str, Tensor]) -> MaskedStudent:
    """EVA-L's network with the fixture's weights; its own two tables are left out of the load."""
    settings = MaskedSettings(
        name="golden_evaL_mae", form="visible", positions="sincos", decoder=DecoderSettings(width=48, depth=2, heads=4)
    )
    made = MaskedStudent(settings, 40, MaskSettings(kind="random", ratio=0.75)).eval()
    state = below(golden, "state_dict/")
    names = {key: key.replace("trunk.", "").replace("head.", "decoder_pred.") for key in made.state_dict()}
    weights = {key: state[name] for key, name in names.items() if name != "pos_embed"}
    assert made.load_state_dict(weights, strict=False) == (["trunk.pos_embed"], [])
    assert state.keys() - names.values() == {"decoder_pos_embed"}
    return made


def test_the_visible_form_is_the_original_masked_autoencoder(shared: Path) -> None:
    """The reference's loss and gradients have the wrong sign (README, point 7)."""
    golden, facts = load(shared, "evaL_mae")
    made = large(golden)
    images, masked = pixels(golden["in/image"]), golden["out/mask"].bool()
    with torch.no_grad():
        kept = golden["out/ids_restore"].argsort(dim=1)[:, :16]  # in the order of the noise; the student's is the image's
        order = kept.argsort(dim=1)
        encoded = golden["out/encoder_tokens"]
        patches = encoded[:, 1:].gather(1, order[:, :, None].expand(-1, -1, 64))
        expected = torch.cat([encoded[:, :1], patches], dim=1)
        assert (made.tokens(images, masked) - expected).abs().max() < 2e-5
        everything = made(images, masked, torch.arange(128)).unflatten(0, (2, 64))
        assert (everything - golden["out/predictions"]).abs().max() < 1e-5
    prediction = made(images, masked, flat_index(masked))
    loss = -cosine_similarity(prediction, golden["in/teacher_features"][masked], dim=-1).mean()
    assert loss.item() == pytest.approx(facts["loss_intended"], abs=1e-6)
    loss.backward()
    assert close(made.mask_token.grad, -golden["grad/mask_token"], 2e-5)
    assert close(made.trunk.patch_embed.proj.weight.grad, -golden["grad/patch_embed.proj.weight"], 2e-5)
    assert close(made.head.weight.grad, -golden["grad/decoder_pred.weight"], 2e-5)


def test_fixed_positions_are_the_original_tables(shared: Path) -> None:
    """Row of the class token, order of rows and columns, sines and cosines; fixed, and in the mask-token form as well."""
    golden, _ = load(shared, "evaL_mae")
    made = large(golden)
    assert (made.trunk.pos_embed - golden["state_dict/pos_embed"]).abs().max() < 1e-7
    assert (made.decoder_positions - golden["state_dict/decoder_pos_embed"]).abs().max() < 1e-7
    other = MaskedStudent(MaskedSettings(name="golden_evaL_mae", positions="sincos"), 40)
    assert torch.equal(other.trunk.pos_embed, made.trunk.pos_embed)
    assert not other.trunk.pos_embed.requires_grad
