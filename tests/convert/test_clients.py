"""What was converted, opened by timm, open_clip, transformers, onnxruntime and torch with no help of ours: the golden outputs.

The call is the line that the record gives, to the letter.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize

from eva_mim.convert.convert import convert
from eva_mim.core.errors import UserError
from tests.conftest import picture
from tests.convert.golden_files import (
    ANSWERS,
    CLIPS,
    GOLDEN,
    MASKED,
    QUICK,
    TOKENS,
    TRUNKS,
    clip_config,
    close,
    converted,
    golden,
    known_to_open_clip,
    marked,
    open_clip_says,
    same,
    timm_says,
    written,
)


def opened(record: dict[str, Any], **libraries: Any) -> Any:
    """What a user gets who copies the line."""
    return eval(record["open_with"], {"timm": timm, "open_clip": open_clip, "torch": torch, **libraries})


@pytest.fixture
def clips(shared: Path, tmp_path: Path) -> Iterator[None]:
    """open_clip knows the CLIP fixtures' architectures by name."""
    (tmp_path / "configs").mkdir()
    configs = {f"golden-{name}": clip_config(golden(shared, name)) for name in CLIPS}
    with known_to_open_clip(tmp_path / "configs", **configs):
        yield


@pytest.mark.parametrize("name", GOLDEN)
def test_timm_opens_the_file(shared: Path, tmp_path: Path, name: str) -> None:
    """Every golden checkpoint; of a CLIP model its image tower."""
    found = golden(shared, name)
    record, dst = converted(written(found, tmp_path), "timm", tmp_path, name)
    model = opened(record)
    timm_says(found, model)
    assert same(dict(model.state_dict()), load_file(dst))


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_timm_opens_a_torch_file(shared: Path, tmp_path: Path, suffix: str) -> None:
    found = golden(shared, "eva02_b_cls")
    record = convert(written(found, tmp_path), tmp_path / f"trunk{suffix}", "timm")
    assert record["open_with"].endswith(f"trunk{suffix}')")
    timm_says(found, opened(record))


@pytest.mark.parametrize(("name", "to"), marked(
    lambda name, to: to == "hf" or name in QUICK, [(name, to) for name in TRUNKS for to in ("hf", "safetensors")]
))
def test_timm_opens_the_folder(shared: Path, tmp_path: Path, name: str, to: str) -> None:
    """The folder of a stage of ours is timm's as well."""
    found = golden(shared, name)
    record, dst = converted(written(found, tmp_path), to, tmp_path, name)
    line = f"timm.create_model('local-dir:{dst}', pretrained=True)"
    assert record["open_with"] == (line if to == "hf" else f"init_from={dst}")
    model = eval(line)
    timm_says(found, model)
    assert tuple(model.pretrained_cfg["input_size"]) == found.images.shape[1:]


@pytest.mark.parametrize("name", CLIPS)
def test_open_clip_opens_the_file(shared: Path, tmp_path: Path, clips: None, name: str) -> None:
    found = golden(shared, name)
    record, dst = converted(written(found, tmp_path), "open_clip", tmp_path)
    assert record["open_with"] == f"open_clip.create_model_and_transforms('golden-{name}', pretrained='{dst}')"
    model, _, transform = opened(record)
    open_clip_says(found, model)
    side = clip_config(found)["vision_cfg"]["image_size"]
    assert transform(picture(1, (300, 200))).shape == (3, side, side)


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("to", ["hf", "safetensors"])
def test_open_clip_and_timm_open_the_folder(shared: Path, tmp_path: Path, name: str, to: str) -> None:
    """open_clip has no name for these: the folder says what they are."""
    found = golden(shared, name)
    source = beside(found, tmp_path)
    with pytest.raises(UserError, match=r"open_clip has no name for this model; use --to hf"):
        converted(source, "open_clip", tmp_path)
    record, dst = converted(source, to, tmp_path)
    assert record["open_with"] == (f"open_clip.create_model('local-dir:{dst}')" if to == "hf" else f"init_from={dst}")
    open_clip_says(found, open_clip.create_model(f"local-dir:{dst}"))
    open_clip_says(found, open_clip.create_model_and_transforms(f"local-dir:{dst}")[0])
    timm_says(found, timm.create_model(f"local-dir:{dst}", pretrained=True))


def beside(found: Any, folder: Path) -> Path:
    """A CLIP model of open_clip's, with its configuration beside it."""
    path = folder / "open_clip_pytorch_model.bin"
    torch.save({"state_dict": found.state}, path)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": clip_config(found)}))
    return path


@pytest.mark.parametrize("name", GOLDEN)
def test_torch_opens_the_original_names(shared: Path, tmp_path: Path, clips: None, name: str) -> None:
    """From the original's file to the original's file: every tensor, its name and its place, bit for bit; tables are computed."""
    found = golden(shared, name)
    record, _ = converted(written(found, tmp_path), "eva", tmp_path, name)
    tree = opened(record)
    back: dict[str, Tensor] = tree if name in (*CLIPS, "clip_bige_visual", "openai_visual") else tree["module"]
    tables = {key for key in found.state if "rope.freqs" in key or key == "decoder_pos_embed" or "position_index" in key}
    assert back.keys() == found.state.keys()
    assert same({key: back[key] for key in back if key not in tables}, {k: v for k, v in found.state.items() if k not in tables})
    for key in tables:
        close(back[key].double(), found.state[key].double(), 1e-6)


@torch.inference_mode()
def test_transformers_opens_the_folder_of_clip(shared: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    found = golden(shared, "openai_visual")
    record, dst = converted(written(found, tmp_path), "transformers", tmp_path, "openai_visual")
    assert record["open_with"] == f"transformers.AutoModel.from_pretrained('{dst}')"
    states = opened(record, transformers=transformers).eval()(pixel_values=found.images).last_hidden_state[:, 1:]
    whole = transformers.CLIPVisionModelWithProjection.from_pretrained(dst).eval()
    dense = whole.visual_projection(whole.vision_model.post_layernorm(states))
    close(dense, found.tensors["out/dense_features"], ANSWERS)
    processor = transformers.AutoImageProcessor.from_pretrained(dst)
    assert processor(picture(1, (300, 200)), return_tensors="pt").pixel_values.shape == (1, 3, 112, 112)


@pytest.mark.parametrize("name", marked(lambda name: name in ("evaL_mae", "eva02_b_cls"), TRUNKS))
@torch.inference_mode()
def test_transformers_opens_timm_s_folder(shared: Path, tmp_path: Path, name: str) -> None:
    """Every tensor is used and none is missing; its answers and tokens are timm's, which are the golden ones (see above)."""
    transformers = pytest.importorskip("transformers")
    found = golden(shared, name)
    record, dst = converted(written(found, tmp_path), "hf", tmp_path, name)
    trunk = opened(record).eval()
    loader = transformers.AutoModelForImageClassification if trunk.num_classes else transformers.AutoModel
    module, info = loader.from_pretrained(dst, output_loading_info=True)
    assert {kind: list(names) for kind, names in info.items() if names} == {}
    assert type(module).__name__.startswith("TimmWrapper")
    said = module.eval()(pixel_values=found.images)
    close(*((said.logits, trunk(found.images)) if trunk.num_classes else (said[0], trunk.forward_features(found.images))), 0)
    timm_says(found, module.timm_model)  # last: it hides patches for good


@pytest.mark.parametrize("name", ["evaL_cls", "eva02_s_mim", "clip_eva02_b"])
def test_transformers_has_names_for_openai_s_clip_alone(shared: Path, tmp_path: Path, clips: None, name: str) -> None:
    with pytest.raises(UserError, match=r"only OpenAI's CLIP has names of its own there; use --to hf: transformers opens"):
        converted(written(golden(shared, name), tmp_path), "transformers", tmp_path, name)
    assert not (tmp_path / f"{name}-transformers").exists()


@pytest.mark.parametrize("name", marked(lambda name: name == "evaL_cls", GOLDEN))
@torch.inference_mode()
def test_onnxruntime_opens_the_file(shared: Path, tmp_path: Path, clips: None, name: str) -> None:
    """A masked model's trunk sees whole images there; timm's, of the same source, stands for the reference."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    found = golden(shared, name)
    source = written(found, tmp_path)
    record, dst = converted(source, "onnx", tmp_path, name)
    assert record["open_with"] == f"onnxruntime.InferenceSession('{dst}')"
    session = opened(record, onnxruntime=onnxruntime)
    texts = {"text": found.tensors["in/text"].numpy()} if name in CLIPS else {}
    names = [output.name for output in session.get_outputs()]
    said = dict(zip(names, map(torch.tensor, session.run(names, {"image": found.images.numpy()} | texts)), strict=True))
    if name in CLIPS:
        image, text = (normalize(said[f"{part}_features"], dim=-1) for part in ("image", "text"))
        close(image, found.tensors["out/image_features"], ANSWERS)
        close(said["logit_scale"] * image @ text.T, found.tensors["out/logits_per_image"], ANSWERS)
    elif name in MASKED or name == "openai_visual":
        trunk, _ = converted(source, "timm", tmp_path, name)
        close(said["tokens"], opened(trunk).eval().forward_features(found.images), TOKENS)
    else:
        wanted = {"clip_bige_visual": "out/image_embed", "relpos_tuned": "out/finetune_logits"}.get(name, "out/logits")
        close(said["output"], found.tensors[wanted], ANSWERS)
