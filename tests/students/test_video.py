"""Classifiers of videos against the image classifier, against attention over all frames done another way; kinds of trunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from eva_mim.core.errors import UserError
from eva_mim.optim import OptimSettings
from eva_mim.optim.groups import parameter_groups
from eva_mim.students import VideoClassifierSettings
from eva_mim.students.video import VideoClassifier, resized_times
from eva_mim.trunks.pixels import normalise

SIZES = {"eva02_tiny_patch14_224": 28, "vit_small_patch16_224": 32, "eva_giant_patch14_224": 28, "vitamin_small_224": 32}


def classifier(name: str = "vit_nano_patch4_32", frames: int = 3, **settings: Any) -> VideoClassifier:
    torch.manual_seed(0)
    side = {"image_size": SIZES[name]} if name in SIZES else {}
    own = {"name": name, "frames": frames, "head_scale": 1.0, **side, **settings}
    return VideoClassifier(VideoClassifierSettings.model_validate(own), 5).eval()


def videos_of(count: int, frames: int, side: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (count, frames, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("pool", ["avg", "token"])
@pytest.mark.parametrize("name", ["vit_nano_patch4_32", "eva02_tiny_patch14_224", "vit_small_patch16_224", "vitamin_small_224"])
def test_one_frame_is_the_image_classifier(name: str, pool: str) -> None:
    if pool == "token" and name.startswith(("vit_nano", "vitamin")):
        pool = "avg"  # they have no class token
    model = classifier(name, frames=1, global_pool=pool)
    side = model.image_size
    images = videos_of(2, 1, side)
    with torch.no_grad():
        alone = model.trunk(normalise(images[:, 0], model.mean, model.std))
        torch.testing.assert_close(model(images), alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_attention_over_all_frames_against_a_wide_picture() -> None:
    """Without positions, the frames of a video are the columns of one wide picture."""
    model = classifier(registers=2)
    trunk: Any = model.trunk
    trunk.pos_embed.zero_()
    images = videos_of(2, 3)
    wide = images.permute(0, 2, 3, 1, 4).reshape(2, 3, 32, 96)
    patches = trunk.patch_embed.proj(normalise(wide, model.mean, model.std)).flatten(2).transpose(1, 2)
    extra = [getattr(trunk, name).expand(2, -1, -1) for name in ("cls_token", "reg_token") if getattr(trunk, name) is not None]
    tokens = torch.cat([*extra, patches], 1)
    assert tokens.shape[1] == 3 * 64 + trunk.num_prefix_tokens
    assert trunk.num_prefix_tokens > 1
    for block in trunk.blocks:
        tokens = block(tokens)
    torch.testing.assert_close(model(images), trunk.forward_head(trunk.norm(tokens)), rtol=1e-4, atol=1e-5)
    # the order of frames is told by their positions alone
    torch.testing.assert_close(model(images.flip(1)), model(images), rtol=1e-4, atol=1e-5)
    model.time_embed.normal_()
    assert (model(images.flip(1)) - model(images)).abs().max() > 1e-4


class Recorder(nn.Module):
    """Keeps what a block is given."""

    def forward(self, tokens: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        self.tokens, self.rope = tokens, rope
        return tokens


@torch.no_grad()
def test_rotary_positions_are_those_of_each_frame() -> None:
    """Frame by frame, patch by patch, behind one class token: the tokens and rotary positions of each frame alone."""
    model = classifier("eva02_tiny_patch14_224", frames=3)
    trunk: Any = model.trunk
    trunk.blocks = nn.ModuleList([Recorder()])
    model.time_embed.normal_()
    images = videos_of(2, 3, 28)
    model(images)
    found = trunk.blocks[0]
    patches, tokens, rope = 4, found.tokens, found.rope
    assert tokens.shape[1] == 1 + 3 * patches
    for frame in range(3):
        alone, turned = trunk._pos_embed(trunk.patch_embed(normalise(images[:, frame], model.mean, model.std)))
        place = slice(1 + frame * patches, 1 + (frame + 1) * patches)
        torch.testing.assert_close(tokens[:, place], alone[:, 1:] + model.time_embed[:, frame])
        assert torch.equal(rope[frame * patches : (frame + 1) * patches], turned)
        torch.testing.assert_close(tokens[:, :1], alone[:, :1])


@torch.no_grad()
def test_the_mean_over_frames() -> None:
    for name in ("vit_nano_patch4_32", "convnext_atto"):
        model = classifier(name, time="mean")
        images = videos_of(2, 3, 64 if name == "convnext_atto" else 32)
        alone = torch.stack([model.trunk(normalise(images[:, frame], model.mean, model.std)) for frame in range(3)])
        torch.testing.assert_close(model(images), alone.mean(0), rtol=1e-4, atol=1e-5)
        assert not hasattr(model, "time_embed")


def test_recomputed_activations_have_the_same_gradients() -> None:
    gradients = []
    for again in (False, True):
        model = classifier("eva02_tiny_patch14_224", grad_checkpointing=again).train()
        model(videos_of(2, 3, 28)).square().sum().backward()
        gradients.append({name: value.grad for name, value in model.named_parameters()})
        assert model.time_embed.grad is not None
        assert model.time_embed.grad.abs().max() > 0
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_positions_are_not_decayed() -> None:
    model = classifier()
    groups = parameter_groups(model, OptimSettings(lr=1.0, weight_decay=0.1, layer_decay=0.5))
    rules = {id(parameter): group for group in groups for parameter in group["params"]}
    for position in (model.time_embed, model.trunk.pos_embed):
        assert rules[id(position)]["weight_decay"] == 0
    assert rules[id(model.time_embed)]["lr_scale"] == 1
    assert rules[id(model.trunk.head.weight)]["weight_decay"] == 0.1  # type: ignore[union-attr]


def test_trunks_that_have_no_sequence() -> None:
    for name in ("convnext_atto", "swin_tiny_patch4_window7_224"):
        with pytest.raises(UserError, match=r"has no sequence of patches for all frames; set student\.time=mean"):
            classifier(name)


def test_positions_of_frames_are_resized_along_time() -> None:
    times = torch.arange(4.0).view(1, 4, 1, 1) * torch.tensor([1.0, -2.0])
    assert torch.equal(resized_times(times, 4), times)
    eight = resized_times(times, 8)[0, :, 0, 0]
    torch.testing.assert_close(eight, nn.functional.interpolate(torch.arange(4.0)[None, None], 8, mode="linear")[0, 0])
    assert resized_times(times, 2)[0, :, 0].tolist() == [[0.5, -1.0], [2.5, -5.0]]
