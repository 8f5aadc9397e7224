"""The masked student sees nothing of what is masked, is timm's model with one seam, and is EVA's model in the fixtures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.eva import Eva, checkpoint_filter_fn
from torch import Tensor

from eva_mim.config import UserError
from eva_mim.objectives.masked_cosine import masked_cosine
from eva_mim.students import ClassifierSettings, TrunkSettings
from eva_mim.students.classifier import HEAD_SCALE, Classifier, LinearProbe
from eva_mim.students.masked import MaskedStudent

CLIP_PIXELS = {
    "mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711),
    "input_size": (3, 112, 112), "first_conv": "patch_embed.proj", "classifier": "head",
}
GOLDEN = {
    "eva01_mim": {"embed_dim": 88, "depth": 3, "num_heads": 4, "mlp_ratio": 384 / 88},
    "eva02_s_mim": {
        "embed_dim": 96, "depth": 2, "num_heads": 3, "mlp_ratio": 8 / 3, "swiglu_mlp": True, "use_rot_pos_emb": True,
    },
    "eva02_b_mim": {
        "embed_dim": 96, "depth": 2, "num_heads": 4, "mlp_ratio": 8 / 3, "swiglu_mlp": True, "use_rot_pos_emb": True,
        "qkv_fused": False, "scale_mlp": True,
    },
}
"""The fixtures' architectures as timm builds them."""

default_cfgs = generate_default_cfgs({f"golden_{name}": CLIP_PIXELS for name in GOLDEN})


def _golden(name: str, pretrained: bool, **options: Any) -> Eva:
    arguments = {"img_size": 112, "patch_size": 14, **GOLDEN[name]} | options
    return build_model_with_cfg(Eva, f"golden_{name}", pretrained, **arguments)


@register_model
def golden_eva01_mim(pretrained: bool = False, **options: Any) -> Eva:
    """EVA-01 of the fixture."""
    return _golden("eva01_mim", pretrained, **options)


@register_model
def golden_eva02_s_mim(pretrained: bool = False, **options: Any) -> Eva:
    """EVA-02 S-type of the fixture."""
    return _golden("eva02_s_mim", pretrained, **options)


@register_model
def golden_eva02_b_mim(pretrained: bool = False, **options: Any) -> Eva:
    """EVA-02 B-type of the fixture."""
    return _golden("eva02_b_mim", pretrained, **options)


def student(name: str = "vit_nano_patch4_32", image_size: int | None = None) -> MaskedStudent:
    """Every parameter random (timm starts biases at 0), so that nothing is hidden by a zero."""
    torch.manual_seed(0)
    made = MaskedStudent(TrunkSettings(name=name, image_size=image_size), 10).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return made


def images_and_mask(made: MaskedStudent, count: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 pictures, [B, N] masks of about 40 %, and their flat indices."""
    generator = torch.Generator().manual_seed(1)
    size = made.image_size
    images = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    masked = torch.rand(count, made.grid[0] * made.grid[1], generator=generator) < 0.4
    return images, masked, masked.flatten().nonzero()[:, 0]


def pixel_mask(made: MaskedStudent, masked: Tensor) -> Tensor:
    """[B, 1, H, W] True where a pixel lies in a masked patch."""
    rows, columns = made.grid
    side = made.image_size // rows
    return masked.reshape(-1, 1, rows, columns).repeat_interleave(side, 2).repeat_interleave(side, 3)


@pytest.mark.parametrize(
    ("name", "size"), [("vit_nano_patch4_32", None), ("eva02_tiny_patch14_224", 56), ("deit3_small_patch16_224", 64)]
)
@torch.no_grad()
def test_no_masked_pixel_reaches_the_output(name: str, size: int | None) -> None:
    """Other pixels behind the mask: every token is the same, bit for bit. One visible pixel: the predictions move."""
    made = student(name, size)
    images, masked, index = images_and_mask(made)
    hidden = pixel_mask(made, masked)
    other = torch.where(hidden, 255 - images, images)
    assert (other != images).float().mean() > 0.3
    assert torch.equal(made(images, masked, index), made(other, masked, index))
    assert torch.equal(made.tokens(images, masked), made.tokens(other, masked))
    row, column = (~hidden[0, 0]).nonzero()[17].tolist()
    seen = images.clone()
    seen[0, :, row, column] = 255 - seen[0, :, row, column]
    change = (made(images, masked, index) - made(seen, masked, index)).abs().amax(-1)
    first = masked[0].sum()
    assert (change[:first] > 0).all()
    assert (change[first:] == 0).all()
    assert not torch.equal(made.tokens(images), made.tokens(other))  # without a mask everything is seen


@torch.no_grad()
def test_a_hybrid_that_looks_across_patches_is_refused_or_sees_nothing() -> None:
    """A convolutional stem mixes masked pixels into visible embeddings: mask tokens come too late for it."""
    try:
        made = student("vit_tiny_r_s16_p8_224", 64)
    except UserError as error:
        assert "vit_tiny_r_s16_p8_224" in str(error)  # noqa: PT017
        return
    images, _, _ = images_and_mask(made)
    masked = torch.tensor([[True, False, False, True]] * 3)
    other = torch.where(pixel_mask(made, masked), 255 - images, images)
    assert torch.equal(made.tokens(images, masked), made.tokens(other, masked))


@pytest.mark.parametrize("name", ["convnet_nano_32", "swin_tiny_patch4_window7_224", "no_such_model"])
def test_what_cannot_be_masked_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=name):
        MaskedStudent(TrunkSettings(name=name), 10)


def test_a_vit_without_class_token_can_be_masked() -> None:
    """Masking needs patch tokens only."""
    made = student("test_vit2")
    images, masked, index = images_and_mask(made)
    other = torch.where(pixel_mask(made, masked), 255 - images, images)
    with torch.no_grad():
        assert torch.equal(made(images, masked, index), made(other, masked, index))


@torch.no_grad()
def test_the_forward_pass_is_timms_pieces_by_hand() -> None:
    made = student()
    trunk: Any = made.trunk
    images, masked, index = images_and_mask(made)
    x = torch.stack([(images[:, c].float() / 255 - made.mean[c]) / made.std[c] for c in range(3)], dim=1)
    rows = []
    for picture, mask in zip(x, masked, strict=True):
        patches = [
            trunk.patch_embed.proj(picture[None, :, r : r + 4, c : c + 4]).flatten()
            for r in range(0, 32, 4) for c in range(0, 32, 4)
        ]
        patches = [made.mask_token.flatten() if hide else patch for patch, hide in zip(patches, mask.tolist(), strict=True)]
        tokens = torch.cat([trunk.cls_token[0], torch.stack(patches)])[None] + trunk.pos_embed
        for block in trunk.blocks:
            tokens = tokens + block.attn(block.norm1(tokens))
            tokens = tokens + block.mlp(block.norm2(tokens))
        tokens = trunk.norm(tokens)[0, 1:]
        rows += [tokens[place] @ made.head.weight.T + made.head.bias for place in range(64) if mask[place]]
    assert torch.allclose(made(images, masked, index), torch.stack(rows), atol=2e-5)


@torch.no_grad()
def test_the_hook_leaves_timms_model_as_it_is() -> None:
    """The same keys, and without a mask the same features."""
    made = student()
    plain = timm.create_model("vit_nano_patch4_32", num_classes=0, global_pool="token").eval()
    assert list(made.trunk.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(made.trunk.state_dict())
    images, masked, _ = images_and_mask(made)
    x = torch.stack([(images[:, c].float() / 255 - made.mean[c]) / made.std[c] for c in range(3)], dim=1)
    expected = plain.forward_features(x)[:, 1:]
    made.tokens(images, masked)  # a masked pass leaves nothing behind
    assert torch.allclose(made.tokens(images), expected, atol=1e-5)
    assert torch.allclose(made.summary(images), expected.mean(1), atol=1e-5)
    assert {name for name in made.state_dict() if not name.startswith("trunk.")} == {"mask_token", "head.weight", "head.bias"}


def test_a_failed_pass_leaves_no_mask_behind() -> None:
    made = student()
    images, masked, _ = images_and_mask(made)
    with torch.no_grad():
        before = made.tokens(images)
        with pytest.raises(RuntimeError):
            made.tokens(images, masked[:, :7])
        assert torch.equal(made.tokens(images), before)


@pytest.mark.parametrize("name", GOLDEN)
def test_eva_models_predict_and_learn_as_the_original_code(shared: Path, name: str) -> None:
    """Predictions, loss and gradients of the fixture's model, through the student and the objective."""
    golden = load_file(shared / "golden" / f"{name}.safetensors")
    facts = json.loads((shared / "golden" / f"{name}.json").read_text())
    state = {key.removeprefix("state_dict/"): value for key, value in golden.items() if key.startswith("state_dict/")}
    made = MaskedStudent(TrunkSettings(name=f"golden_{name}"), 64).eval()
    renamed = checkpoint_filter_fn({"module": state}, made.trunk)  # it also moves norm to fc_norm: moved back here
    made.trunk.load_state_dict({key.replace("fc_norm.", "norm."): value for key, value in renamed.items()})
    made.mask_token.data.copy_(state["mask_token"])
    made.head.load_state_dict({key: state[f"lm_head.{key}"] for key in ("weight", "bias")})
    shift, scale = (torch.tensor(CLIP_PIXELS[key]).reshape(3, 1, 1) for key in ("mean", "std"))
    images = (golden["in/image"].double() * scale + shift).float() * 255
    masked = golden["in/mask"].flatten(1)
    prediction = made(images, masked, masked.flatten().nonzero()[:, 0])
    assert (prediction - golden["out/predictions"]).abs().max() < 3e-5
    target = golden["in/teacher_features"][masked]
    loss = masked_cosine(prediction, target).loss
    assert loss.item() == pytest.approx(facts["loss"], abs=1e-6)
    loss.backward()
    patch: Tensor = made.get_parameter("trunk.patch_embed.proj.weight").grad  # type: ignore[assignment]
    slowed = 0.1 if facts["constructor"].get("stop_grad_conv1") else 1.0
    for mine, key in ((made.head.weight.grad, "lm_head.weight"), (slowed * patch, "patch_embed.proj.weight")):
        assert mine is not None
        expected = golden[f"grad/{key}"]
        assert (mine - expected).abs().max() < 5e-5 * expected.abs().max(), key


# ---- classifiers


@pytest.mark.parametrize(
    ("name", "pool"), [("vit_nano_patch4_32", "avg"), ("vit_nano_patch4_32", "token"), ("convnet_nano_32", "avg")]
)
@torch.no_grad()
def test_a_probe_folds_into_timms_own_head(name: str, pool: Any) -> None:
    """timm's model with `timm_weights` gives the probe's logits."""
    torch.manual_seed(0)
    probe = LinearProbe(ClassifierSettings(name=name, global_pool=pool), 7)
    images = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8)
    for _ in range(5):
        probe.train()(images)  # moves the norm's statistics away from 0 and 1
    probe.eval().linear.weight.normal_()
    probe.linear.bias.normal_()
    plain = timm.create_model(name, num_classes=7, **({"global_pool": pool} if "vit" in name else {})).eval()
    weights = {key: value.clone() for key, value in probe.state_dict().items()}
    plain.load_state_dict(probe.timm_weights(weights))
    x = torch.stack([(images[:, c].float() / 255 - probe.mean[c]) / probe.std[c] for c in range(3)], dim=1)
    expected = probe(images)
    assert torch.allclose(plain(x), expected, atol=1e-4 * expected.abs().max().item())
    assert expected.std(0).mean() > 0.1


def test_a_probe_trains_only_its_layer() -> None:
    torch.manual_seed(0)
    probe = LinearProbe(ClassifierSettings(name="convnet_nano_32"), 7).train()
    before = {key: value.clone() for key, value in probe.trunk.state_dict().items()}
    probe(torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)).sum().backward()
    learning = {name for name, parameter in probe.named_parameters() if parameter.grad is not None}
    assert learning == {"linear.weight", "linear.bias"}
    assert all(torch.equal(value, before[key]) for key, value in probe.trunk.state_dict().items())  # batch norms as well


@torch.no_grad()
def test_a_classifier_is_timms_model_with_a_small_head() -> None:
    torch.manual_seed(0)
    made = Classifier(ClassifierSettings(name="vit_nano_patch4_32"), 7).eval()
    plain = timm.create_model("vit_nano_patch4_32", num_classes=7, global_pool="avg").eval()
    plain.load_state_dict(made.timm_weights(dict(made.state_dict())))
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    x = torch.stack([(images[:, c].float() / 255 - made.mean[c]) / made.std[c] for c in range(3)], dim=1)
    assert torch.allclose(made(images), plain(x), atol=1e-6)
    torch.manual_seed(0)
    fresh = timm.create_model("vit_nano_patch4_32", num_classes=7, global_pool="avg")
    assert torch.allclose(plain.head.weight, fresh.head.weight * HEAD_SCALE, atol=1e-9)
    assert made(images).softmax(-1).sub(1 / 7).abs().max() < 1e-3
