"""What was converted, opened by timm, open_clip, transformers, onnxruntime and torch with no help of ours: the golden outputs.

The call is the line that the record gives, to the letter. Then the same files as sources, and what their records say of tensors.
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
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize

from eva_mim.convert.convert import convert
from eva_mim.convert.targets import FORMATS
from eva_mim.core.errors import UserError
from tests.conftest import picture
from tests.convert.conftest import Convert
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

GRAPHS = ("evaL_cls", "evaL_mae", "clip_eva01_g")
"""Whose graphs are not left to the long tier: a classifier, a masked trunk, two towers."""


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
def test_timm_opens_the_file(shared: Path, conversion: Convert, name: str) -> None:
    """Every golden checkpoint; of a CLIP model its image tower."""
    done = conversion(name, "timm")
    model = opened(done.record)
    timm_says(golden(shared, name), model)
    assert same(dict(model.state_dict()), load_file(done.path))


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_timm_opens_a_torch_file(shared: Path, tmp_path: Path, suffix: str) -> None:
    found = golden(shared, "eva02_b_cls")
    record = convert(written(found, tmp_path), tmp_path / f"trunk{suffix}", "timm")
    assert record["open_with"].endswith(f"trunk{suffix}')")
    timm_says(found, opened(record))


@pytest.mark.parametrize(("name", "to"), marked(
    lambda name, to: to == "hf" or name in QUICK, [(name, to) for name in TRUNKS for to in ("hf", "safetensors")]
))
def test_timm_opens_the_folder(shared: Path, conversion: Convert, name: str, to: str) -> None:
    """The folder of a stage of ours is timm's as well."""
    found, done = golden(shared, name), conversion(name, to)
    line = f"timm.create_model('local-dir:{done.path}', pretrained=True)"
    assert done.record["open_with"] == (line if to == "hf" else f"init_from={done.path}")
    model = eval(line)
    timm_says(found, model)
    assert tuple(model.pretrained_cfg["input_size"]) == found.images.shape[1:]


@pytest.mark.parametrize("name", CLIPS)
def test_open_clip_opens_the_file(shared: Path, clips: None, conversion: Convert, name: str) -> None:
    found, done = golden(shared, name), conversion(name, "open_clip")
    assert done.record["open_with"] == f"open_clip.create_model_and_transforms('golden-{name}', pretrained='{done.path}')"
    model, _, transform = opened(done.record)
    open_clip_says(found, model)
    side = clip_config(found)["vision_cfg"]["image_size"]
    assert transform(picture(1, (300, 200))).shape == (3, side, side)


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("to", ["hf", "safetensors"])
def test_open_clip_and_timm_open_the_folder(shared: Path, tmp_path: Path, name: str, to: str) -> None:
    """open_clip has no name for these: the folder says what they are."""
    found = golden(shared, name)
    source = beside(found, tmp_path)
    if to == "hf":
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
def test_torch_opens_the_original_names(shared: Path, conversion: Convert, name: str) -> None:
    """From the original's file to the original's file: every tensor, its name and its place, bit for bit; tables are computed."""
    found = golden(shared, name)
    tree = opened(conversion(name, "eva").record)
    back: dict[str, Tensor] = tree if name in (*CLIPS, "clip_bige_visual", "openai_visual") else tree["module"]
    tables = split(found.state)[0]
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
def test_transformers_opens_timm_s_folder(shared: Path, conversion: Convert, name: str) -> None:
    """Every tensor is used and none is missing; its answers and tokens are timm's, which are the golden ones (see above)."""
    transformers = pytest.importorskip("transformers")
    found, done = golden(shared, name), conversion(name, "hf")
    trunk = opened(done.record).eval()
    loader = transformers.AutoModelForImageClassification if trunk.num_classes else transformers.AutoModel
    module, info = loader.from_pretrained(done.path, output_loading_info=True)
    assert {kind: list(names) for kind, names in info.items() if names} == {}
    assert type(module).__name__.startswith("TimmWrapper")
    for parameter in module.parameters():  # transformers maps the file; where a tensor lies decides how products are summed
        parameter.data = parameter.data.clone()
    said = module.eval()(pixel_values=found.images)
    close(*((said.logits, trunk(found.images)) if trunk.num_classes else (said[0], trunk.forward_features(found.images))), 0)
    timm_says(found, module.timm_model)  # last: it hides patches for good


@pytest.mark.parametrize("name", ["evaL_cls", "eva02_s_mim", "clip_eva02_b"])
def test_transformers_has_no_names_for_other_models(shared: Path, tmp_path: Path, clips: None, name: str) -> None:
    with pytest.raises(UserError, match=r"--to transformers: (only OpenAI's CLIP and plain|it has fc_norm).*use --to hf"):
        converted(written(golden(shared, name), tmp_path), "transformers", tmp_path, name)
    assert not (tmp_path / f"{name}-transformers").exists()


@pytest.mark.parametrize("name", marked(lambda name: name == "evaL_cls", GOLDEN, lambda name: name not in GRAPHS))
@torch.inference_mode()
def test_onnxruntime_opens_the_file(shared: Path, conversion: Convert, name: str) -> None:
    """A masked model's trunk sees whole images there; timm's, of the same source, stands for the reference.

    Each graph takes 5 to 15 s and is proved by onnxruntime itself; `test_onnx.py` has a network of every family.
    """
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    found, done = golden(shared, name), conversion(name, "onnx")
    assert done.record["open_with"] == f"onnxruntime.InferenceSession('{done.path}')"
    session = opened(done.record, onnxruntime=onnxruntime)
    texts = {"text": found.tensors["in/text"].numpy()} if name in CLIPS else {}
    names = [output.name for output in session.get_outputs()]
    said = dict(zip(names, map(torch.tensor, session.run(names, {"image": found.images.numpy()} | texts)), strict=True))
    if name in CLIPS:
        image, text = (normalize(said[f"{part}_features"], dim=-1) for part in ("image", "text"))
        close(image, found.tensors["out/image_features"], ANSWERS)
        close(said["logit_scale"] * image @ text.T, found.tensors["out/logits_per_image"], ANSWERS)
    elif name in MASKED or name == "openai_visual":
        close(said["tokens"], opened(conversion(name, "timm").record).eval().forward_features(found.images), TOKENS)
    else:
        wanted = {"clip_bige_visual": "out/image_embed", "relpos_tuned": "out/finetune_logits"}.get(name, "out/logits")
        close(said["output"], found.tensors[wanted], ANSWERS)


# read again

AGAIN: dict[str, dict[str, Any]] = {
    "eva02_s_cls": {"arguments": {"ref_feat_shape": 16}}, "relpos_tuned": {"image_size": (168, 168)},
}
"""What a bare file under timm's names no longer tells, in which another registered architecture has its names and shapes."""
NAMELESS = ("rope.freqs", "relative_position_index", "decoder_pos_embed")


def split(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """(tables that are computed, what only a masked model has, all else) of a state dict under the original names."""
    tables = {key: value for key, value in state.items() if any(part in key for part in NAMELESS)}
    beyond = ("mask_token", "lm_head.", "decoder_") if "mask_token" in state else ()
    masked = {key: value for key, value in state.items() if beyond and key.startswith(beyond) and key not in tables}
    return tables, masked, {key: value for key, value in state.items() if key not in tables | masked}


def ways(name: str) -> list[str]:
    """The formats that hold a golden checkpoint."""
    holds = {"open_clip": name in CLIPS, "timm": name not in CLIPS, "transformers": name == "openai_visual"}
    return [to for to in FORMATS if to not in ("eva", "onnx") and holds.get(to, True)]


@pytest.mark.parametrize(("name", "to"), marked(
    lambda name, to: name in QUICK or (name in MASKED and to == "safetensors"),
    [(name, to) for name in GOLDEN for to in ways(name)],
    lambda name, to: to == "safetensors" and name not in (*MASKED, *QUICK),  # whose weights are those of the folder for `hf`
))
def test_from_the_original_s_names_and_back_changes_no_bit(
    shared: Path, tmp_path: Path, clips: None, conversion: Convert, name: str, to: str
) -> None:
    found, again = golden(shared, name), AGAIN.get(name, {}) if to == "timm" else {}
    record, back = converted(conversion(name, to).path, "eva", tmp_path, name, **again)
    theirs = to if to in ("transformers", "open_clip") else "open_clip" if name in CLIPS else "timm"
    assert record["source"]["names"] == theirs
    tree = torch.load(back, weights_only=True)
    below = "visual." if name == "clip_bige_visual" else ""  # timm's names do not tell where it was
    tables, masked, rest = split({below + key: value for key, value in tree.get("module", tree).items()})
    old_tables, old_masked, old_rest = split(found.state)
    assert same(rest, old_rest)
    assert same(masked, old_masked if to == "safetensors" else {})
    if to == "safetensors" or name not in MASKED:  # a trunk alone counts as no masked model, whose positions are plain indices
        assert tables.keys() == old_tables.keys()
        for key, value in tables.items():
            close(value.double(), old_tables[key].double(), 1e-6)


@pytest.mark.parametrize(("name", "to"), marked(lambda name, to: name != "evaL_mae" and to != "hf", [
    (name, to) for name in ("eva01_mim", "evaL_mae", "openai_visual", "clip_eva02_b")
    for to in ("timm", "safetensors", "eva", "hf", "transformers") if to != "transformers" or name == "openai_visual"
]))
def test_every_tensor_is_accounted_for_once(shared: Path, conversion: Convert, name: str, to: str) -> None:
    found, done = golden(shared, name), conversion(name, to)
    keys = done.record["keys"]
    result = [*keys["loaded"], *keys["resized"], *keys["new"]]
    assert sorted(result) == sorted(names_in(done.path))
    assert len(set(result)) == len(result)
    assert set(keys.get("reasons", {})) >= {*keys["resized"], *keys["new"], *keys["ignored"]}
    assert len(set(keys["ignored"])) == len(keys["ignored"])
    assert set(keys["ignored"]) - {*split(found.state)[0]} <= set(found.state)
    if to != "transformers":  # where one tensor becomes three
        assert len(keys["loaded"]) + len(keys["resized"]) + len(keys["ignored"]) == len(found.state)


def names_in(path: Path) -> list[str]:
    """Of the tensors of a file, or of a folder's model."""
    if path.is_dir():
        whole = path / "open_clip_model.safetensors"
        head = names_in(path / "head.safetensors") if (path / "head.safetensors").is_file() else []
        return head + names_in(whole if whole.is_file() else path / "model.safetensors")
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return list(file.keys())
    tree = torch.load(path, weights_only=True)
    return list(tree.get("module", tree))
