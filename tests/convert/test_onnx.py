"""Graphs for onnxruntime against the networks in torch that they were made of."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from timm.models.beit import Beit
from torch import Tensor, nn

import eva_mim.trunks.small  # noqa: F401
from eva_mim.convert import onnx as ours
from eva_mim.convert.onnx import export, runner
from eva_mim.convert.parity import BOUNDS, compare, outputs, sample_tokens
from eva_mim.core.errors import UserError
from tests.convert.test_parity import OPENAI, SMALL, TEXT, TIMM, drawn, swapped

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
NETWORKS: dict[str, tuple[Callable[[], Any], tuple[int, int]]] = {
    "EVA-01": (lambda: timm.create_model("eva_giant_patch14_224", embed_dim=88, **SMALL), (32, 32)),
    "EVA-02 split": (lambda: timm.create_model("eva02_base_patch14_224", embed_dim=96, **SMALL), (32, 32)),
    "EVA-02 packed, not square": (
        lambda: timm.create_model("eva02_tiny_patch14_224", embed_dim=96, **SMALL | {"img_size": (24, 40)}), (24, 40)),
    "EVA-02 with inner norms": (lambda: timm.create_model("eva02_base_patch16_clip_224", embed_dim=96, **SMALL), (32, 32)),
    "BEiT, tables in blocks": (lambda: timm.create_model("beit_base_patch16_224", embed_dim=64, **SMALL), (32, 32)),
    "BEiT, one table": (lambda: Beit(embed_dim=64, use_shared_rel_pos_bias=True, use_abs_pos_emb=False, **SMALL), (32, 32)),
    "ViTamin": (lambda: timm.create_model("vitamin_small_224", img_size=64, depth=2), (64, 64)),
    "convolutions": (lambda: timm.create_model("convnet_nano_32", num_classes=0, global_pool=""), (32, 32)),
    "CLIP": (lambda: open_clip.CLIP(24, OPENAI, TEXT, quick_gelu=True), (32, 32)),
    "CLIP of timm": (lambda: open_clip.CustomTextCLIP(24, TIMM, TEXT, init_logit_bias=-10.0), (32, 32)),
}
FIRST = ("EVA-02 packed, not square", "BEiT, one table", "CLIP of timm")
"""One with each kind of positions; the others are in the long tier."""


def ready(build: Callable[[], Any]) -> Any:
    module = build()
    module.load_state_dict(drawn(module))
    return module.eval()


def tiny() -> Any:
    return ready(lambda: timm.create_model("vit_nano_patch4_32", img_size=8, depth=1, embed_dim=12, num_classes=3))


def pixels(batch: int, size: tuple[int, int]) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(batch))


def names(values: Any) -> list[str]:
    return [value.name for value in values]


def test_a_graph_says_what_its_network_says(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    module, path = tiny(), tmp_path / "tiny.onnx"
    path.write_text("an older file")
    quiet = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert export(module, path, (8, 8)) == [path]
    assert tuple(capfd.readouterr()) == ("", "")
    assert logging.root.manager.disable == quiet
    assert list(tmp_path.iterdir()) == [path]
    graph = onnx.load(path).graph
    assert (names(graph.input), names(graph.output)) == (["image"], ["tokens", "output"])
    run = runner(path)
    for batch in (1, 3):
        images = pixels(batch, (8, 8))
        assert compare(outputs(module, images), run(images, None), bound=BOUNDS["float32"]).passed
    with torch.no_grad():
        module.blocks[0].mlp.fc2.bias[3] += 1e-2
    assert not compare(outputs(module, images), run(images, None), bound=BOUNDS["float32"]).passed


@pytest.mark.slow
@pytest.mark.parametrize("name", [name if name in FIRST else pytest.param(name, marks=pytest.mark.long) for name in NETWORKS])
def test_every_family_at_every_batch_size(name: str, tmp_path: Path) -> None:
    build, size = NETWORKS[name]
    module, path = ready(build), tmp_path / "model.onnx"
    export(module, path, size)
    run = runner(path)
    for images, texts in ((1, 3), (3, 1), (4, 4)):
        given = pixels(images, size), sample_tokens(16, 100, texts) if hasattr(module, "encode_text") else None
        found = compare(outputs(module, *given), run(*given), bound=BOUNDS["float32"])
        assert found.passed, str(found)
        assert not found.alone
    if name.startswith("EVA-02"):  # what the graph says is not what a network with swapped axes of its positions says
        turned = ready(build)
        swapped(turned)
        assert not compare(outputs(turned, pixels(2, size)), run(pixels(2, size), None), bound=BOUNDS["bfloat16"]).passed
    if name == "CLIP of timm":
        graph = onnx.load(path).graph
        shapes = {
            value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
            for value in (*graph.input, *graph.output)
        }
        assert shapes == {
            "image": ["images", 3, 32, 32], "text": ["texts", 16],
            "image_features": ["images", 24], "text_features": ["texts", 24], "logit_scale": [], "logit_bias": [],
        }


def test_the_set_of_operators_is_the_one_that_is_asked_for(tmp_path: Path) -> None:
    export(tiny(), tmp_path / "tiny.onnx", (8, 8), opset=18)
    assert [entry.version for entry in onnx.load(tmp_path / "tiny.onnx").opset_import] == [18]


@pytest.mark.slow
def test_large_weights_lie_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "EMBEDDED", 1000)
    module, path = tiny(), tmp_path / "tiny.onnx"
    weights = tmp_path / "tiny.onnx.data"
    assert export(module, path, (8, 8)) == [weights, path]
    assert sorted(tmp_path.iterdir()) == [path, weights]
    assert weights.stat().st_size > 0.8 * sum(value.nbytes for value in module.parameters()) > path.stat().st_size / 10
    images = pixels(2, (8, 8))
    assert compare(outputs(module, images), runner(path)(images, None), bound=BOUNDS["float32"]).passed
    weights.unlink()
    with pytest.raises(Exception, match="data"):
        runner(path)


@pytest.mark.slow
def test_what_cannot_be_exported_leaves_nothing_and_is_told_in_a_line(tmp_path: Path) -> None:
    class Choosing(nn.Module):
        def forward_features(self, image: Tensor) -> Tensor:
            return image.flatten(1) + len(image[image > 0.5])

        def forward_head(self, features: Tensor) -> Tensor:
            return features if bool(features.sum() > 3) else features[:, :2]

    with pytest.raises(UserError, match=r"^Choosing cannot be exported to ONNX: [^\n]+$"):
        export(Choosing(), tmp_path / "model.onnx", (8, 8))
    assert not list(tmp_path.iterdir())


def test_without_the_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "find_spec", lambda name: None if name != "onnx" else name)
    with pytest.raises(UserError, match=r"^--to onnx needs onnxscript: pip install 'eva-mim\[onnx\]'$"):
        export(nn.Identity(), tmp_path / "model.onnx", (8, 8))
    with pytest.raises(UserError, match="--to onnx needs onnxruntime: pip install"):
        runner(tmp_path / "model.onnx")
