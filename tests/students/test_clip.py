"""The CLIP student: patch dropout, temperature and bias, recomputed activations."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from timm.models.eva import Eva
from torch import Tensor

from eva_mim.core.errors import UserError
from eva_mim.students.clip import ClipStudent
from eva_mim.trunks.pixels import normalise
from tests.students.tiny_towers import clip_folder, clip_settings, pairs


def student(name: str = "vit_of_tests", **options: Any) -> ClipStudent:
    """Weights from one seed; biases and norms are not what they start with, so that each counts."""
    torch.manual_seed(0)
    made = ClipStudent(clip_settings(name, **options))
    with torch.no_grad():
        for parameter in made.trunk.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


# ---- patch dropout


def one_image(trunk: Eva, image: Tensor, kept: Tensor, rotations: Tensor) -> Tensor:
    """[1 + kept, D] of [3, H, W]: a forward pass over a list of tokens, position by position."""
    patches = trunk.patch_embed(image[None])[0]
    assert trunk.cls_token is not None
    assert trunk.pos_embed is not None
    rows = [trunk.cls_token[0, 0] + trunk.pos_embed[0, 0]]
    rows += [patches[place] + trunk.pos_embed[0, 1 + place] for place in kept.tolist()]
    table = torch.stack([rotations[place] for place in kept.tolist()])
    x = torch.stack(rows)[None]
    for block in trunk.blocks:
        x = block(x, rope=table)
    return trunk.norm(x)[0]


def test_kept_tokens_keep_their_own_rotary_positions() -> None:
    trunk: Any = student("eva02_of_tests", patch_dropout=0.6).trunk.train()
    seen: list[Tensor] = []
    trunk.patch_drop.register_forward_hook(lambda module, inputs, output: seen.append(output[1]))
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        found = trunk.forward_features(images)
        (kept,) = seen
        assert kept.shape == (5, 6)  # 40 % of 16
        assert len({tuple(sorted(row)) for row in kept.tolist()}) == 5
        assert all(len(set(row)) == 6 for row in kept.tolist())
        table = trunk.rope.get_embed()
        for tokens, image, places in zip(found, images, kept, strict=True):
            torch.testing.assert_close(tokens, one_image(trunk, image, places, table), atol=2e-6, rtol=0)
            wrong = one_image(trunk, image, places, table.roll(1, dims=0))
            assert (tokens - wrong).abs().max() > 1e-2  # the test would see other rows


@pytest.mark.parametrize("name", ["vit_of_tests", "vitamin_of_tests"])
def test_a_share_of_the_patches_is_left_out_after_positions_were_added(name: str) -> None:
    made = student(name, patch_dropout=0.5)
    trunk: Any = made.trunk.train()
    seen: list[tuple[Tensor, Tensor]] = []
    trunk.patch_drop.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    pixels, _ = pairs(0, 8)
    images = normalise(pixels, made.mean, made.std)
    with torch.no_grad():
        for _ in range(2):
            trunk.forward_features(images)
        (before, first), (_, second) = seen
        embedded = trunk.patch_embed(images)
        prefix, patches = trunk.num_prefix_tokens, embedded.shape[1]
        torch.testing.assert_close(before[:, prefix:], embedded + trunk.pos_embed[:, prefix:])
    assert first.shape[1] == second.shape[1] == prefix + patches // 2
    assert not torch.equal(first, second)
    for output in (first, second):
        assert torch.equal(output[:, :prefix], before[:, :prefix])
        for image in range(8):
            rows = [before[image, prefix:].eq(token).all(dim=1).nonzero().flatten() for token in output[image, prefix:]]
            assert len({int(row) for row in rows}) == patches // 2


def test_evaluation_sees_every_patch_and_export_forgets_the_dropout() -> None:
    images, texts = pairs(0)
    dropping, whole = student("eva02_of_tests", patch_dropout=0.5), student("eva02_of_tests")
    with torch.no_grad():
        assert torch.equal(dropping.eval().encode_image(images), whole.eval().encode_image(images))
        assert torch.equal(dropping(images, texts)[0], whole(images, texts)[0])
        assert not torch.equal(dropping.train().encode_image(images), whole.train().encode_image(images))
        torch.manual_seed(3)
        drawn = dropping.encode_image(images)
        torch.manual_seed(3)
        assert torch.equal(dropping.encode_image(images), drawn)
    assert dropping.open_clip_config() == whole.open_clip_config()


def test_a_tower_that_cannot_leave_out_patches_is_refused() -> None:
    with pytest.raises(UserError, match=r"student\.patch_dropout=0\.5: convnet_nano_32 cannot leave out patches"):
        student("convnet_nano_32", patch_dropout=0.5)


# ---- temperature and bias


def test_without_a_bias_it_is_open_clips_forward_pass() -> None:
    images, texts = pairs(0)
    made = student().eval()
    image, text, scale = made(images, texts)
    theirs = made.model(normalise(images, made.mean, made.std), texts)
    assert torch.equal(image, theirs[0])
    assert torch.equal(text, theirs[1])
    assert scale.item() == pytest.approx(1 / 0.07, rel=1e-6)


def test_temperature_and_bias_start_where_they_are_told_and_learn(tmp_path: Path) -> None:
    images, texts = pairs(0)
    made = student(init_logit_scale=math.log(10), init_logit_bias=-10.0, proj_bias=True).eval()
    image, text, scale, bias = made(images, texts)
    assert (scale.item(), bias.item()) == (pytest.approx(10.0, rel=1e-6), -10.0)
    assert {tuple(value.shape) for name, value in made.state_dict().items() if "logit" in name} == {(1,)}
    logits = scale * image @ text.T + bias
    (3 * logits).sum().backward()
    cosines = (image @ text.T).sum().item()
    assert float(made.model.logit_bias.grad) == pytest.approx(27.0)
    assert float(made.model.logit_scale.grad) == pytest.approx(3 * 10 * cosines, rel=1e-5)
    # the same model, opened by open_clip
    torch.nn.init.normal_(made.model.visual.head.proj.bias)
    model = open_clip.create_model(f"local-dir:{clip_folder(tmp_path / 'out', made)}").eval()
    assert model.logit_bias.shape == model.logit_scale.shape == ()
    with torch.no_grad():
        image, text, scale, bias = made(images, texts)
        theirs, _ = model.get_logits(normalise(images, made.mean, made.std), texts)
    torch.testing.assert_close(theirs, scale * image @ text.T + bias, atol=1e-5, rtol=1e-5)


def test_a_temperature_beyond_clips_limit_is_refused() -> None:
    for value in (-0.1, math.log(100) + 1e-3):
        with pytest.raises(ValueError, match="init_logit_scale"):
            clip_settings(init_logit_scale=value)


# ---- activation checkpointing


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_recomputed_activations_give_the_same_gradient_with_less_memory(dropout: float) -> None:
    images, texts = pairs(0)
    gradients, kept = [], []
    for again in (False, True):
        made = student("eva02_of_tests", grad_checkpointing=again, patch_dropout=dropout).train()
        sizes: list[int] = []

        def keep(tensor: Tensor, into: list[int] = sizes) -> Tensor:
            into.append(tensor.numel())
            return tensor

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            image, text, scale = made(images, texts)
        kept.append(sum(sizes))
        (scale * image @ text.T).diagonal().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in made.named_parameters()})
    assert kept[1] < 0.8 * kept[0]
    for name, wanted in gradients[0].items():
        assert wanted is not None, name
        torch.testing.assert_close(gradients[1][name], wanted, atol=1e-6, rtol=1e-5)
