"""Networks without weights, networks run block by block, and what counts as the same answer."""

from __future__ import annotations

import json
import math
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models.beit import Beit
from torch import Tensor, nn

import eva_mim.trunks.small  # noqa: F401
from eva_mim.convert import parity
from eva_mim.convert.parity import BOUNDS, compare, outputs, sample_images, sample_tokens, streamed, unloaded
from eva_mim.core.errors import UserError
from eva_mim.data.source_settings import SceneSettings
from eva_mim.data.sources.scenes import SceneSource
from eva_mim.weights.files.lazy import deferred
from eva_mim.weights.files.read import open_checkpoint
from tests.conftest import picture, png

Build = Callable[[], Any]
TEXT = {"context_length": 16, "vocab_size": 100, "width": 32, "heads": 2, "layers": 2}
OPENAI = {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 16, "layers": 3}
TIMM = {"timm_model_name": "vit_nano_patch4_32", "timm_model_pretrained": False, "timm_pool": "token", "timm_proj": "linear",
        "image_size": 32}
SMALL = {"img_size": 32, "patch_size": 8, "depth": 3, "num_heads": 4, "num_classes": 7}
NETWORKS: dict[str, Build] = {
    "EVA-01": lambda: timm.create_model("eva_giant_patch14_224", embed_dim=88, **SMALL),
    "EVA-02 split": lambda: timm.create_model("eva02_base_patch14_224", embed_dim=96, **SMALL),
    "EVA-02 packed": lambda: timm.create_model("eva02_tiny_patch14_224", embed_dim=96, **SMALL),
    "ViT": lambda: timm.create_model("vit_nano_patch4_32"),
    "BEiT, tables in blocks": lambda: timm.create_model("beit_base_patch16_224", embed_dim=64, **SMALL),
    "BEiT, one table": lambda: Beit(embed_dim=64, use_shared_rel_pos_bias=True, use_abs_pos_emb=False, **SMALL),
    "convolutions": lambda: timm.create_model("convnet_nano_32"),  # batch norms: buffers that are stored
    "CLIP": lambda: open_clip.CLIP(24, OPENAI, TEXT, quick_gelu=True),
    "CLIP of timm": lambda: open_clip.CustomTextCLIP(24, TIMM, TEXT, init_logit_bias=-10.0),
}
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(7))
TOKENS = sample_tokens(16, 100, 3)


def drawn(module: Any, seed: int = 0) -> dict[str, Tensor]:
    """Weights of which none is constant, at the scales of the golden fixtures, as float32."""
    noise = torch.Generator().manual_seed(seed)
    made = {}
    for name, value in module.state_dict().items():
        draw = torch.randn(value.shape, generator=noise)
        one = name.rpartition(".")[2] == "weight" and value.ndim == 1
        scale = 0.4 if "token" in name or "pos" in name else 1.2 / math.sqrt(value[0].numel()) if value.ndim > 1 else 0.15
        if "running_var" in name:
            made[name] = 1 + draw.abs()
        else:
            made[name] = scale * draw + one if value.is_floating_point() else value
    return made


def loaded(build: Build, weights: dict[str, Tensor]) -> Any:
    """The network as a user makes it."""
    module = build()
    module.load_state_dict(weights)
    return module.eval()


def emptied(build: Build) -> Any:
    with unloaded():
        return build()


def said(module: Any) -> dict[str, Tensor]:
    return outputs(module, PIXELS, TOKENS if hasattr(module, "encode_text") else None)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", NETWORKS)
def test_an_unloaded_network_has_every_buffer_and_no_weight(name: str) -> None:
    normal, weights = NETWORKS[name](), drawn(NETWORKS[name]())
    empty = emptied(NETWORKS[name])
    assert all(value.is_meta for value in empty.parameters())
    assert [(key, value.shape, value.dtype) for key, value in empty.named_parameters()] == [
        (key, value.shape, value.dtype) for key, value in normal.named_parameters()
    ]
    for (key, one), (other_key, other) in zip(empty.named_buffers(), normal.named_buffers(), strict=True):
        assert key == other_key
        assert torch.equal(one, other), key
    empty.load_state_dict(weights, assign=True)
    assert same(said(empty), said(loaded(NETWORKS[name], weights)))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_streamed_network_says_the_same_bit_for_bit(name: str) -> None:
    weights = drawn(NETWORKS[name]())
    module = streamed(emptied(NETWORKS[name]), weights)
    wanted = said(loaded(NETWORKS[name], weights))
    assert all(value.abs().max() > 1e-3 for value in wanted.values())
    for _ in range(2):  # and the weights are gone in between
        assert same(said(module), wanted)
        assert 0.7 < sum(value.is_meta for value in module.parameters()) / len(list(module.parameters())) < 1


def test_vitamin_whose_constructor_runs_a_part_of_it() -> None:
    def build() -> Any:
        return timm.create_model("vitamin_small_224", img_size=64, depth=2)

    weights, pixels = drawn(build()), PIXELS.repeat(1, 1, 2, 2)
    module = streamed(emptied(build), weights)
    assert same(outputs(module, pixels), outputs(loaded(build, weights), pixels))
    assert {path for path, _ in parity._blocks(module)} == {
        "patch_embed.backbone.stages.0", "patch_embed.backbone.stages.1", "blocks.0", "blocks.1"
    }


def test_networks_of_transformers() -> None:
    pytest.importorskip("transformers")
    from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64}
    text = sizes | {"vocab_size": 100, "max_position_embeddings": 16, "eos_token_id": 99, "bos_token_id": 98}
    image = sizes | {"image_size": 32, "patch_size": 8}
    clip, dino = CLIPConfig(text_config=text, vision_config=image, projection_dim=24), Dinov2Config(**image)
    given: dict[str, Tensor] = {"pixel_values": PIXELS}
    cases: list[tuple[Build, dict[str, Tensor], list[str]]] = [
        (lambda: CLIPModel(clip), given | {"input_ids": TOKENS[:2]}, ["image_embeds", "text_embeds"]),
        (lambda: Dinov2Model(dino), given, ["last_hidden_state"]),
    ]
    for build, inputs, names in cases:
        weights = drawn(build())
        module = streamed(emptied(build), weights)
        assert sum(value.is_meta for value in module.parameters()) > 30
        with torch.inference_mode():
            wanted, found = loaded(build, weights)(**inputs), module(**inputs)
        assert all(torch.equal(found[name], wanted[name]) for name in names)


def test_a_billion_parameters_cost_no_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    module = emptied(lambda: timm.create_model("eva_giant_patch14_560"))
    assert sum(value.numel() for value in module.parameters()) > 1e9
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes; the weights are 4 million


def test_tied_weights_stay_tied_and_an_error_ends_it() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
            self.two.weight = self.one.weight

    tied = emptied(Tied)
    assert tied.one.weight is tied.two.weight
    assert tied.one.weight.is_meta
    with pytest.raises(ZeroDivisionError):
        emptied(lambda: nn.Linear(2, 1 // 0))
    after = nn.Linear(2, 2)
    assert not after.weight.is_meta
    assert torch.equal(after(torch.zeros(1, 2)), after.bias[None])


def test_one_block_is_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes of all parameters that are not empty, whenever one is read."""
    for name in ("EVA-02 split", "CLIP of timm"):
        weights, peaks, reads = drawn(NETWORKS[name]()), list[int](), list[str]()
        module = emptied(NETWORKS[name])
        names = {id(value): key for key, value in weights.items()}

        def reading(value: Tensor, module: Any = module, names: Any = names, peaks: Any = peaks, reads: Any = reads) -> Tensor:
            reads.append(names[id(value)])
            peaks.append(value.nbytes + sum(part.nbytes for part in module.parameters() if not part.is_meta))
            return value

        monkeypatch.setattr(parity, "materialise", reading)
        streamed(module, weights)
        blocks: dict[str, int] = {}
        for key, value in weights.items():
            block = next((path for path, _ in parity._blocks(module) if key.startswith(f"{path}.")), "")
            blocks[block] = blocks.get(block, 0) + value.nbytes
        outside = blocks.pop("")
        assert sum(weights[key].nbytes for key in reads) == outside
        said(module)
        assert max(peaks) <= outside + max(blocks.values()) < outside + 0.6 * sum(blocks.values())
        assert sorted(reads) == sorted(weights)  # each once


def test_a_block_that_fails_gives_its_weights_back() -> None:
    weights = drawn(NETWORKS["ViT"]())
    module = streamed(NETWORKS["ViT"](), weights)
    with pytest.raises(RuntimeError, match=r"normalized_shape|shape"):
        module.blocks[1](torch.zeros(1, 5, 7))
    assert all(value.is_meta for value in module.blocks.parameters())


def test_half_weights_and_files_are_computed_in_float32(tmp_path: Path) -> None:
    weights = {key: value.bfloat16() for key, value in drawn(NETWORKS["ViT"]()).items()}
    wanted = said(loaded(NETWORKS["ViT"], {key: value.float() for key, value in weights.items()}))
    save_file(weights, tmp_path / "model.safetensors")
    for given in (weights, deferred(open_checkpoint(tmp_path / "model.safetensors"))):
        module = streamed(emptied(NETWORKS["ViT"]).bfloat16(), given)
        assert same(said(module), wanted)
        assert all(value.dtype == torch.float32 for value in wanted.values())


def test_weights_of_another_network_are_named() -> None:
    weights = drawn(NETWORKS["ViT"]())
    wrong = {name: value for name, value in weights.items() if name != "norm.bias"} | {"neck.weight": torch.zeros(2)}
    wrong["blocks.2.mlp.fc1.bias"] = torch.zeros(5)
    with pytest.raises(UserError) as raised:
        streamed(NETWORKS["ViT"](), wrong)
    assert str(raised.value) == (
        "the weights do not fit the model VisionTransformer: 1 missing: norm.bias; 1 left over: neck.weight; "
        "1 of another shape: blocks.2.mlp.fc1.bias [5] for [384]"
    )


def test_buffers_that_need_weights_are_named() -> None:
    class Derived(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 3)
            self.register_buffer("twice", 2 * self.weight.detach(), persistent=False)

    with pytest.raises(UserError, match="Derived cannot be built without its weights, which twice need"):
        streamed(emptied(Derived), {"weight": torch.zeros(3, 3), "bias": torch.zeros(3)})


def test_outputs_are_those_of_the_libraries() -> None:
    vit = loaded(NETWORKS["ViT"], drawn(NETWORKS["ViT"]())).train()  # it is put into evaluation mode
    found = outputs(vit, PIXELS)
    assert torch.equal(found["answer"], vit(PIXELS))
    assert torch.equal(found["tokens"], vit.forward_features(PIXELS))
    vit.reset_classifier(0, "")
    assert list(outputs(vit, PIXELS)) == ["tokens"]
    clip = loaded(NETWORKS["CLIP of timm"], drawn(NETWORKS["CLIP of timm"]()))
    found = outputs(clip, PIXELS, TOKENS[:2])
    image, text, scale, bias = clip(PIXELS, TOKENS[:2])
    for name, unit in (("image", image), ("text", text)):
        assert torch.allclose(found[name] / found[name].norm(dim=-1, keepdim=True), unit, atol=1e-6)
    assert (found["scale"], found["bias"]) == (scale, bias)
    assert "text" not in outputs(clip, PIXELS)


def test_figures_of_a_comparison() -> None:
    draw = torch.Generator().manual_seed(3)
    one = torch.randn(2, 5, 4, generator=draw)
    other = one + 1e-3 * torch.randn(2, 5, 4, generator=draw)
    found = compare({"tokens": one, "answer": one[0]}, {"tokens": other, "scale": one[0, 0]}, bound=1.0)
    a, b = one.double().numpy().reshape(10, 4), other.double().numpy().reshape(10, 4)
    largest = float(max(abs(x - y) for x, y in zip(a.flat, b.flat, strict=True)))
    cosine = min(float(x @ y) / math.sqrt(float(x @ x) * float(y @ y)) for x, y in zip(a, b, strict=True))
    figures = found.differences["tokens"]
    assert (figures.largest, figures.source) == (largest, np.abs(a).max())
    assert figures.cosine == pytest.approx(cosine, abs=1e-12)
    ratio = largest / float(np.abs(a).max())
    for bound, passed in ((1.001 * ratio, True), (0.999 * ratio, False)):
        found = compare({"tokens": one, "answer": one[0]}, {"tokens": other, "scale": one[0, 0]}, bound=bound)
        assert found.passed is passed
        first, *rest = str(found).splitlines()
        wanted = f"tokens  [2, 5, 4]  largest difference {largest:.3g} (of {np.abs(a).max():.3g})  cosine 0.99999"
        assert first.startswith(wanted)
        assert first.endswith("of it") is not passed
        assert rest == ["answer  of one model only: not compared", "scale   of one model only: not compared"]
        assert json.loads(json.dumps(found.as_dict()))["outputs"]["tokens"]["largest"] == largest


def test_what_is_equal() -> None:
    zero, scale = torch.zeros(2, 3), torch.tensor(14.3)
    found = compare({"answer": zero, "scale": scale}, {"answer": zero, "scale": scale}, bound=0.0)
    assert found.passed
    assert [(row.largest, row.cosine) for row in found.differences.values()] == [(0.0, 1.0), (0.0, 1.0)]
    assert not compare({"answer": zero}, {"answer": zero + 1e-30}, bound=0.5).passed
    assert not compare({"scale": scale}, {"scale": -scale}, bound=0.5).passed


@pytest.mark.parametrize(("bad", "counts"), [((True, True), (1, 1)), ((True, False), (1, 0)), ((False, True), (0, 1))])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_fails_even_where_both_are(bad: tuple[bool, bool], counts: tuple[int, int], value: float) -> None:
    sides = [torch.ones(2, 3), torch.ones(2, 3)]
    for side, broken in zip(sides, bad, strict=True):
        side[1, 2] = value if broken else 1.0
    found = compare({"answer": sides[0]}, {"answer": sides[1]}, bound=1e9)
    assert not found.passed
    assert str(found) == f"answer  [2, 3]  NaN or infinite: {counts[0]} numbers of the source, {counts[1]} of the result"
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["outputs"]["answer"]["largest"] is None


def test_weights_of_nan_fail() -> None:
    weights = {name: torch.full_like(value, math.nan) for name, value in drawn(NETWORKS["ViT"]()).items()}
    found = said(streamed(NETWORKS["ViT"](), weights))
    assert not compare(found, found, bound=BOUNDS["bfloat16"]).passed


def test_outputs_that_cannot_be_compared() -> None:
    with pytest.raises(UserError, match="the source gives tokens, the result image, scale"):
        compare({"tokens": PIXELS}, {"image": PIXELS, "scale": PIXELS}, bound=1)
    with pytest.raises(UserError, match=r"tokens is \[4, 17, 8\] of the source, but \[4, 16, 8\] of the result"):
        compare({"tokens": torch.zeros(4, 17, 8)}, {"tokens": torch.zeros(4, 16, 8)}, bound=1)


def swapped(module: Any) -> None:
    rows, columns = module.patch_embed.grid_size
    table = module.rope.pos_embed.reshape(rows, columns, -1)
    module.rope.pos_embed = table.transpose(0, 1).reshape(rows * columns, -1)


def tanh(module: Any) -> None:
    for part in module.modules():
        if isinstance(part, nn.GELU):
            part.approximate = "tanh"


@pytest.mark.parametrize(
    ("name", "dtype", "change"),
    [
        ("EVA-02 split", "float32", lambda module: module.blocks[1].mlp.fc2.bias[3].add_(1e-2)),
        ("ViT", "float32", lambda module: module.blocks[0].attn.qkv.bias[5].add_(1e-2)),
        ("CLIP", "float32", lambda module: module.transformer.resblocks[1].attn.in_proj_bias[70].add_(1e-2)),
        ("EVA-01", "float32", tanh),
        ("EVA-01", "bfloat16", lambda module: module.blocks[1].attn.v_bias.zero_()),
        ("EVA-02 split", "bfloat16", swapped),
        ("EVA-02 packed", "bfloat16", swapped),
        ("ViT", "bfloat16", lambda module: module.pos_embed.zero_()),
    ],
)
def test_a_mistake_is_seen_at_the_bound_of_its_dtype(name: str, dtype: str, change: Callable[[Any], None]) -> None:
    weights = drawn(NETWORKS[name]())
    right, wrong = loaded(NETWORKS[name], weights), loaded(NETWORKS[name], weights)
    assert compare(said(right), said(wrong), bound=0.0).passed
    with torch.no_grad():
        change(wrong)
    assert not compare(said(right), said(wrong), bound=BOUNDS[dtype]).passed


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounded_weights_pass_at_their_own_bound_alone(name: str, dtype: str) -> None:
    weights = drawn(NETWORKS[name]())
    rounded = {key: value.to(getattr(torch, dtype)).to(value.dtype) for key, value in weights.items()}
    one, other = (said(loaded(NETWORKS[name], given)) for given in (weights, rounded))
    assert compare(one, other, bound=BOUNDS[dtype]).passed
    assert not compare(one, other, bound=BOUNDS["float32"]).passed


def test_another_kernel_of_attention_passes() -> None:
    weights = drawn(NETWORKS["EVA-02 split"]())
    module = loaded(NETWORKS["EVA-02 split"], weights)
    one = said(module)
    for block in module.blocks:
        block.attn.fused_attn = False
    found = compare(one, said(module), bound=BOUNDS["float32"])
    assert found.passed
    assert found.differences["tokens"].largest > 0


def test_images_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "b.png").write_bytes(png(picture(1, (40, 32))))
    (tmp_path / "a.png").write_bytes(b"no picture")
    (tmp_path / "d.png").write_bytes(png(picture(3, (20, 50)).convert("RGBA")))
    (tmp_path / "c.png").write_bytes(png(picture(2, (24, 24)).convert("L")))
    (tmp_path / "e.txt").write_text("words")
    found = sample_images((16, 24), tmp_path, 2)
    wanted = [Image.open(tmp_path / f"{name}.png").convert("RGB").resize((24, 16), Image.Resampling.BICUBIC) for name in "bc"]
    assert found.dtype == torch.uint8
    assert torch.equal(found, torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in wanted]))
    assert len(sample_images((16, 24), tmp_path)) == 3
    for name in "bcd":
        (tmp_path / f"{name}.png").write_bytes(b"")
    with pytest.raises(UserError, match="none of its 4 images can be read"):
        sample_images((16, 24), tmp_path)
    with pytest.raises(UserError, match="nothing: cannot be read: No such file"):
        sample_images((16, 24), tmp_path / "nothing")


def test_images_without_a_folder() -> None:
    found = sample_images((48, 48))
    scene = SceneSource(SceneSettings(size=48), "val").read(1).image
    assert torch.equal(found[1], torch.from_numpy(np.array(scene)).permute(2, 0, 1))
    assert torch.equal(found, sample_images((48, 48)))
    neighbours = (found[..., 1:].float() - found[..., :-1].float()).abs().mean((1, 2, 3))
    assert neighbours[:2].max() < 40
    assert neighbours[2:] == pytest.approx([256 / 3] * 2, rel=0.05)  # of independent uniform numbers
    assert sample_images((32, 64), count=1).shape == (1, 3, 32, 64)


def test_tokens_have_clips_form() -> None:
    found = sample_tokens(77, 49408)
    ends = found.argmax(-1).tolist()
    assert len(set(ends)) == 4
    assert (min(ends), max(ends)) == (2, 76)
    for row, end in zip(found.tolist(), ends, strict=True):
        assert row[0] == 49406
        assert row[end] == 49407
        assert all(0 < token < 49406 for token in row[1:end])
        assert not any(row[end + 1 :])
    assert torch.equal(found, sample_tokens(77, 49408))
