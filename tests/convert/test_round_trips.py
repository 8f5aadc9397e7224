"""Every family there and back, from names that are written down here.

Full size, without memory: our names must be those of the library's own `state_dict()`, shape by shape, and the way back must give
every tensor that went in. Small size, with drawn weights, through files: every bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from timm.models.beit import Beit
from torch import Tensor, nn

from eva_mim.convert.parity import unloaded
from eva_mim.trunks.meta import meta_device
from eva_mim.weights.files.lazy import deferred, materialise
from eva_mim.weights.files.read import open_checkpoint
from eva_mim.weights.files.write import write_safetensors, write_torch
from eva_mim.weights.names.buffers import Rope
from eva_mim.weights.names.eva import TRUNK, from_eva, from_stage, to_eva, visual_trunk
from eva_mim.weights.names.families import detect
from eva_mim.weights.names.huggingface import build, for_module, from_transformers, to_transformers
from eva_mim.weights.names.openai import from_openai, openai_to_timm, to_openai

Shapes = dict[str, tuple[int, ...]]
LONG = [pytest.mark.slow, pytest.mark.long]
"""Another size or grid of a model that is tried at full size already."""


def pair(name: str, *shape: int) -> Shapes:
    """A layer with a bias, or a norm."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def below(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


def shapes(weights: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(value.shape) for name, value in weights.items()}


def empty(names: Shapes) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in names.items()}


def drawn(names: Shapes) -> dict[str, Tensor]:
    return {name: torch.randn(shape) for name, shape in names.items()}


def resblocks(width: int, depth: int) -> Shapes:
    """CLIP's own transformer, of both towers."""
    one = {"attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,)} | pair("attn.out_proj", width, width)
    one |= pair("ln_1", width) | pair("ln_2", width) | pair("mlp.c_fc", 4 * width, width) | pair("mlp.c_proj", width, 4 * width)
    return {f"transformer.resblocks.{n}.{name}": shape for n in range(depth) for name, shape in one.items()}


def text_tower(width: int, depth: int, embed: int, context: int = 77, words: int = 49408) -> Shapes:
    return {"positional_embedding": (context, width), "text_projection": (width, embed), "token_embedding.weight": (words, width),
            **pair("ln_final", width), **resblocks(width, depth)}


@dataclass(frozen=True)
class Original:
    """A model of the original code, with the names of facts, section 6."""

    style: str
    """Of a block: "01", "L" (a ViT's), "packed" or "naive" (EVA-02)."""
    width: int
    depth: int
    heads: int
    hidden: int
    side: int = 16
    """Of the grid."""
    patch: int = 14
    form: str = "mean"
    """"mim", "mae", "mean" (fc_norm), "token" (norm), "clip"."""
    head: int = 1000
    text: tuple[int, ...] = ()
    """Width, layers(, context, words)."""
    relative: str = ""
    """"shared" or "per block"."""
    layer_scale: bool = False
    decoder: tuple[int, int] = (512, 4)
    timm: str = ""
    """What our names must be: of this architecture, or with `text` of open_clip's."""

    @property
    def rope(self) -> Rope | None:
        wanted = Rope(self.width // self.heads, None if self.form == "mim" else 16)
        return wanted if self.style in ("packed", "naive") else None

    def small(self) -> Original:
        """Two blocks, a grid of 4 x 4."""
        return replace(self, width=16, depth=2, heads=2, hidden=24, side=4, patch=3, head=5, decoder=(8, 1),
                       text=(8, 1, 6, 20) if self.text else ())

    def block(self) -> Shapes:
        width, hidden = self.width, self.hidden
        made = pair("norm1", width) | pair("norm2", width) | pair("attn.proj", width, width)
        made |= {"gamma_1": (width,), "gamma_2": (width,)} if self.layer_scale else {}
        if self.style == "naive":
            made |= {f"attn.{part}_proj.weight": (width, width) for part in "qkv"}
            made |= pair("attn.inner_attn_ln", width) if self.form == "clip" else {}
        else:
            made |= {"attn.qkv.weight": (3 * width, width)}
        made |= {"attn.qkv.bias": (3 * width,)} if self.style == "L" else {"attn.q_bias": (width,), "attn.v_bias": (width,)}
        if self.style in ("01", "L"):
            return made | pair("mlp.fc1", hidden, width) | pair("mlp.fc2", width, hidden)
        if self.style == "packed":
            return made | pair("mlp.w12", 2 * hidden, width) | pair("mlp.w3", width, hidden)
        made |= pair("mlp.w1", hidden, width) | pair("mlp.w2", hidden, width) | pair("mlp.w3", width, hidden)
        return made | pair("mlp.ffn_ln", hidden)

    def names(self) -> Shapes:
        """All parameters; not the tables."""
        width, made = self.width, {f"blocks.{n}.{name}": shape for n in range(self.depth) for name, shape in self.block().items()}
        made |= {"cls_token": (1, 1, width)} | pair("patch_embed.proj", width, 3, self.patch, self.patch)
        made |= pair("fc_norm" if self.form == "mean" else "norm", width)
        table = ((2 * self.side - 1) ** 2 + 3, self.heads)
        if self.relative:
            homes = ["rel_pos_bias"] if self.relative == "shared" else [f"blocks.{n}.attn" for n in range(self.depth)]
            made |= {f"{home}.relative_position_bias_table": table for home in homes}
        else:
            made["pos_embed"] = (1, self.side**2 + 1, width)
        if self.form == "mim":
            return made | {"mask_token": (1, 1, width)} | pair("lm_head", self.head, width)
        if self.form == "mae":
            decoder, depth = self.decoder
            one = replace(self, width=decoder, hidden=4 * decoder).block()
            made |= {f"decoder_blocks.{n}.{name}": shape for n in range(depth) for name, shape in one.items()}
            made |= {"mask_token": (1, 1, decoder)} | pair("decoder_embed", decoder, width) | pair("decoder_norm", decoder)
            return made | pair("decoder_pred", self.head, decoder)
        made |= pair("head", self.head, width)
        if self.form == "clip":
            return below("visual.", made) | below("text.", text_tower(self.text[0], self.text[1], self.head, *self.text[2:])) | {
                "logit_scale": ()
            }
        return made

    def tables(self) -> dict[str, Tensor]:
        """What the original code stores besides: computed here in loops, in double precision."""
        side, made, above = self.side, dict[str, Tensor](), "visual." if self.form == "clip" else ""
        if self.rope:
            half, scale = self.rope.head_width // 2, (self.rope.reference or side) / side
            angles = torch.tensor([
                [place * scale / 10000 ** (channel // 2 * 2 / half) for place in (row, column) for channel in range(half)]
                for row in range(side) for column in range(side)
            ], dtype=torch.float64)
            for home in (f"{above}rope", *(f"{above}blocks.{n}.attn.rope" for n in range(self.depth))):
                made |= {f"{home}.freqs_cos": angles.cos().float(), f"{home}.freqs_sin": angles.sin().float()}
        if self.relative:
            places, wide = [(row, column) for row in range(side) for column in range(side)], 2 * side - 1
            index = torch.tensor([[wide**2 + 2] + [wide**2] * side**2] + [
                [wide**2 + 1] + [(y - v + side - 1) * wide + x - u + side - 1 for v, u in places] for y, x in places
            ])
            homes = ["rel_pos_bias"] if self.relative == "shared" else [f"blocks.{n}.attn" for n in range(self.depth)]
            made |= {f"{home}.relative_position_index": index for home in homes}
        if self.form == "mae":
            quarter, rows = self.decoder[0] // 4, [[0.0] * self.decoder[0]]
            for place in range(side**2):
                turns = [[at / 10000 ** (k / quarter) for k in range(quarter)] for at in (place % side, place // side)]
                rows.append([wave(turn) for axis in turns for wave in (math.sin, math.cos) for turn in axis])
            made["decoder_pos_embed"] = torch.tensor([rows])
        return made

    def library(self) -> nn.Module:
        """What our names must be the names of."""
        with meta_device():
            if self.text:
                config = open_clip.get_model_config(self.timm)
                config.pop("custom_text")
                return open_clip.model.CustomTextCLIP(**config)
            pooled = self.form == "mean"
            options: dict[str, Any] = {"num_classes": self.head if self.form in ("mean", "token") else 0}
            options |= {"global_pool": "avg" if pooled else "token"}
            if self.relative:
                shared = self.relative == "shared"
                return Beit(patch_size=self.patch, embed_dim=self.width, depth=self.depth, num_heads=self.heads,
                            mlp_ratio=self.hidden / self.width, init_values=0.1, use_abs_pos_emb=False,
                            use_shared_rel_pos_bias=shared, use_rel_pos_bias=not shared, **options)
            return timm.create_model(self.timm, img_size=self.side * self.patch, **options)


def _originals() -> Iterator[tuple[str, Original]]:
    giant = Original("01", 1408, 40, 16, 6144, timm="eva_giant_patch14_224")
    yield "EVA-01 g masked", replace(giant, form="mim", head=768)
    yield "EVA-01 g mean", giant
    yield "EVA-01 g mean 336", replace(giant, side=24, head=21841)
    yield "EVA-01 g token", replace(giant, form="token")
    yield "EVA-01 shared tables", replace(giant, form="mim", relative="shared", layer_scale=True)
    yield "EVA-01 a table a block", replace(giant, relative="per block", layer_scale=True)
    large = Original("L", 1024, 24, 16, 4096, timm="eva_large_patch14_196")
    yield "EVA-L masked", replace(large, form="mae", head=1024)
    yield "EVA-L 196", replace(large, side=14)
    yield "EVA-L 336", replace(large, side=24, timm="eva_large_patch14_336")
    sizes = {"tiny": ("packed", 192, 12, 3, 512), "small": ("packed", 384, 12, 6, 1024), "base": ("naive", 768, 12, 12, 2048),
             "large": ("naive", 1024, 24, 16, 2730)}
    for size, numbers in sizes.items():
        model = Original(*numbers, timm=f"eva02_{size}_patch14_224")
        yield f"EVA-02 {size} masked", replace(model, form="mim", head=1024)
        yield f"EVA-02 {size} mean", model
        yield f"EVA-02 {size} mean 448", replace(model, side=32)
    text, more = (768, 12), (1024, 24)
    giant = replace(giant, form="clip", head=1024)
    yield "EVA01-CLIP-g-14", replace(giant, text=text, timm="EVA01-g-14")
    yield "EVA01-CLIP-g-14-plus", replace(giant, text=more, timm="EVA01-g-14-plus")
    base, large = (replace(Original(*sizes[size]), form="clip") for size in ("base", "large"))  # type: ignore[arg-type]
    yield "EVA02-CLIP-B-16", replace(base, side=14, patch=16, head=512, text=(512, 12), timm="EVA02-B-16")
    yield "EVA02-CLIP-L-14", replace(large, head=768, text=text, timm="EVA02-L-14")
    yield "EVA02-CLIP-L-14-336", replace(large, side=24, head=768, text=text, timm="EVA02-L-14-336")
    enormous = replace(giant, width=1792, depth=64, hidden=15360)
    yield "EVA02-CLIP-E-14", replace(enormous, text=more, timm="EVA02-E-14")
    yield "EVA02-CLIP-E-14-plus", replace(enormous, text=(1280, 32), timm="EVA02-E-14-plus")


ORIGINALS = dict(_originals())
KINDS = {name: case for name, case in ORIGINALS.items() if not name[-3:].isdigit() and "-plus" not in name}
"""One of each at a small size."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in KINDS else LONG) for name in ORIGINALS])
def test_the_original_names_are_the_library_s_and_come_back(name: str) -> None:
    case = ORIGINALS[name]
    state, tables = empty(case.names()), case.tables()
    done = from_eva(state | tables)
    assert shapes(done.weights) == shapes(case.library().state_dict())
    assert shapes(done.outside) == {
        key.replace("lm_head", "head").replace("decoder_pred", "head"): shape for key, shape in case.names().items()
        if key.startswith(("mask_token", "lm_head", "decoder_"))
    }
    assert (set(done.report.ignored), done.rope) == (tables.keys(), case.rope)
    back = to_eva(done.weights, done.outside, grid=done.grid, rope=done.rope)
    assert shapes(back.weights) == shapes(state | tables)
    assert [key for key in state if back.weights[key] is not state[key]] == []
    assert set(back.report.new) == tables.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", KINDS)
def test_the_original_weights_come_back_through_files(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    case = KINDS[name].small()
    tables = {key: value.to(dtype) if value.is_floating_point() else value for key, value in case.tables().items()}
    state = {key: value.to(dtype) for key, value in drawn(case.names()).items()} | tables
    torch.save({"module": state, "epoch": 3}, tmp_path / "original.pt")
    done = from_eva(deferred(open_checkpoint(tmp_path / "original.pt")))
    assert set(done.report.ignored) == tables.keys()
    write_safetensors(tmp_path / "trunk.safetensors", done.weights)
    write_safetensors(tmp_path / "head.safetensors", done.outside)
    weights, outside = (deferred(open_checkpoint(tmp_path / f"{part}.safetensors")) if kept else {}
                        for part, kept in (("trunk", done.weights), ("head", done.outside)))
    assert (done.rope, done.grid) == (case.rope, (4, 4) if tables else None)
    write_torch(tmp_path / "back.pt", to_eva(weights, outside, grid=done.grid, rope=done.rope).weights, container="module")
    back = torch.load(tmp_path / "back.pt", weights_only=True)["module"]
    assert shapes(back) == shapes(state)
    assert [key for key, value in state.items() if back[key].dtype != value.dtype] == []
    assert [key for key in case.names() if not torch.equal(back[key], state[key])] == []
    step = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert [key for key in tables if (back[key].double() - tables[key].double()).abs().max() > step] == []


OPENAI = {  # width, layers, patch, grid, embedding; width of the text tower; timm's name
    "ViT-B-32": (768, 12, 32, 7, 512, 512, "vit_base_patch32_clip_quickgelu_224"),
    "ViT-B-16": (768, 12, 16, 14, 512, 512, "vit_base_patch16_clip_quickgelu_224"),
    "ViT-L-14": (1024, 24, 14, 16, 768, 768, "vit_large_patch14_clip_quickgelu_224"),
    "ViT-L-14-336": (1024, 24, 14, 24, 768, 768, "vit_large_patch14_clip_quickgelu_336"),
}


def openai(width: int, depth: int, patch: int, side: int, embed: int, text: int, *rest: int) -> Shapes:
    visual = {"class_embedding": (width,), "positional_embedding": (side**2 + 1, width), "proj": (width, embed)}
    visual |= {"conv1.weight": (width, 3, patch, patch)} | pair("ln_pre", width) | pair("ln_post", width)
    return below("visual.", visual | resblocks(width, depth)) | text_tower(text, 12, embed, *rest) | {"logit_scale": ()}


@pytest.mark.parametrize("name", [pytest.param(name, marks=LONG if name[-4:] == "-336" else []) for name in OPENAI])
def test_openai_s_names_are_the_libraries_and_come_back(name: str) -> None:
    width, _, patch, side, embed, text, timm_name = OPENAI[name]
    state = empty(openai(*OPENAI[name][:6]))
    sizes = {"input_resolution": torch.tensor(224), "context_length": torch.tensor(77), "vocab_size": torch.tensor(49408)}
    done = from_openai(state | sizes)
    with meta_device():
        config = open_clip.get_model_config(f"{name}-quickgelu")
        model = open_clip.model.CLIP(**config)
        tower = timm.create_model(timm_name, num_classes=embed)
    assert shapes(done.weights) == shapes(model.state_dict())
    assert done.report.ignored == list(sizes)
    assert shapes(openai_to_timm(done.weights).weights) == shapes(tower.state_dict())
    custom = from_openai(state, custom_text=True).weights
    assert {key for key in custom if key.startswith("text.")} == {f"text.{key}" for key in state if "visual." not in key} - {
        "text.logit_scale"
    }
    for back in (to_openai(done.weights).weights, to_openai(custom).weights):
        assert back.keys() == state.keys()
        assert [key for key in state if back[key] is not state[key]] == []
    theirs, settings = to_transformers(done.weights, detect(done.weights), heads=width // 64, text_heads=text // 64,
                                       image_size=patch * side, eps=1e-5, activation="quick_gelu")
    with unloaded():
        module = build(settings)
    assert shapes(for_module(theirs.weights, module)) == shapes(module.state_dict())
    assert shapes(from_transformers(theirs.weights, settings).weights) == shapes(state)


def test_openai_s_weights_come_back_from_transformers() -> None:
    torch.manual_seed(0)
    state = drawn(openai(16, 2, 7, 4, 8, 32, 6, 20))
    theirs, settings = to_transformers(state, detect(state), heads=2, text_heads=4, image_size=28, eps=1e-5)
    back = to_openai(from_transformers(theirs.weights, settings).weights).weights
    assert shapes(back) == shapes(state)
    assert [key for key in state if not torch.equal(materialise(back[key]), state[key])] == []


@dataclass(frozen=True)
class Hub:
    """A model of transformers: `vit` (ViT and DeiT), `dinov2`, `dinov2_with_registers`."""

    kind: str
    width: int
    depth: int
    side: int
    patch: int
    timm: str
    hidden: int = 0
    """Of a SwiGLU; 0: a plain MLP, four times as wide."""
    classes: int = 0
    image: int = 224

    def names(self) -> Shapes:
        """As the published files have them."""
        width, block = self.width, dict[str, tuple[int, ...]]()
        for part in ("query", "key", "value"):
            block |= pair(f"attention.attention.{part}", width, width)
        block |= pair("attention.output.dense", width, width)
        if self.kind == "vit":
            block |= pair("layernorm_before", width) | pair("layernorm_after", width)
            block |= pair("intermediate.dense", 4 * width, width) | pair("output.dense", width, 4 * width)
        else:
            block |= pair("norm1", width) | pair("norm2", width)
            block |= {f"layer_scale{n}.lambda1": (width,) for n in (1, 2)}
            first, second = ("weights_in", "weights_out") if self.hidden else ("fc1", "fc2")
            hidden = self.hidden or 4 * width
            block |= pair(f"mlp.{first}", 2 * hidden if self.hidden else hidden, width) | pair(f"mlp.{second}", width, hidden)
        made: Shapes = {"embeddings.cls_token": (1, 1, width), "embeddings.position_embeddings": (1, self.side**2 + 1, width)}
        made |= pair("embeddings.patch_embeddings.projection", width, 3, self.patch, self.patch) | pair("layernorm", width)
        made |= {f"encoder.layer.{n}.{name}": shape for n in range(self.depth) for name, shape in block.items()}
        made |= {"embeddings.mask_token": (1, width)} if self.kind != "vit" else {}
        made |= {"embeddings.register_tokens": (1, 4, width)} if "registers" in self.kind else {}
        return below("vit.", made) | pair("classifier", self.classes, width) if self.classes else made

    def library(self) -> nn.Module:
        with meta_device():
            return timm.create_model(self.timm, num_classes=self.classes, img_size=self.image)


HUB = {
    "ViT-B/16": Hub("vit", 768, 12, 14, 16, "vit_base_patch16_224", classes=1000),
    "ViT-L/16 384": Hub("vit", 1024, 24, 24, 16, "vit_large_patch16_384", classes=1000, image=384),
    "ViT-H/14": Hub("vit", 1280, 32, 16, 14, "vit_huge_patch14_224", classes=21841),
    "DeiT-Ti": Hub("vit", 192, 12, 14, 16, "deit_tiny_patch16_224", classes=1000),
    "DeiT-S": Hub("vit", 384, 12, 14, 16, "deit_small_patch16_224", classes=1000),
    "DeiT-B 384": Hub("vit", 768, 12, 24, 16, "deit_base_patch16_384", classes=1000, image=384),
} | {
    f"DINOv2 {size}{tag}": Hub(kind, width, depth, 37, 14, f"vit_{size}_patch14_{more}dinov2", image=518, hidden=hidden)
    for size, width, depth, hidden in (
        ("small", 384, 12, 0), ("base", 768, 12, 0), ("large", 1024, 24, 0), ("giant", 1536, 40, 4096),
    )
    for kind, tag, more in (("dinov2", "", ""), ("dinov2_with_registers", " registers", "reg4_"))
}


@pytest.mark.parametrize("name", HUB)
def test_transformers_names_are_timm_s(name: str) -> None:
    case = HUB[name]
    ours = from_transformers(empty(case.names()), {"model_type": case.kind}).weights
    assert shapes(ours) == shapes(case.library().state_dict())


@pytest.mark.parametrize(("name", "trunk"), [
    ("ViTamin-S", "vitamin_small_224"),
    *(pytest.param(*names, marks=LONG) for names in (
        ("ViTamin-B", "vitamin_base_224"), ("ViTamin-L", "vitamin_large_224"), ("ViTamin-L2", "vitamin_large2_224"),
        ("ViTamin-XL-256", "vitamin_xlarge_256"),
    )),
])
def test_vitamin_in_open_clip_timm_and_in_training(name: str, trunk: str) -> None:
    config = open_clip.get_model_config(name)
    config.pop("custom_text")
    with meta_device():
        state = open_clip.model.CustomTextCLIP(**config).state_dict()
        library = timm.create_model(trunk, num_classes=0).state_dict()
    done = visual_trunk(state)
    assert shapes(done.weights) == shapes(library)
    assert {f"{TRUNK}{key}" for key in done.weights} | set(done.report.ignored) == state.keys()
    assert [key for key, value in done.weights.items() if value is not state[TRUNK + key]] == []
    again = from_stage({f"model.{key}": value for key, value in state.items()})
    assert (again.weights.keys(), again.outside) == (state.keys(), {})
    assert [key for key in state if again.weights[key] is not state[key]] == []
    assert from_stage({f"trunk.{key}": value for key, value in done.weights.items()}).weights.keys() == library.keys()
