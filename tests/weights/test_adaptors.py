"""`eva_mim.load`: finished stages as networks, their adaptors, and the same by plain torch."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import eva_mim
from eva_mim.cli import main
from eva_mim.core.errors import UserError
from eva_mim.teachers import TeacherSettings, build_teacher
from tests.conftest import REPOSITORY
from tests.tiny import CLASSIFY, CLIP, MIM, records, run, teacher_file, write_recipe

pytestmark = pytest.mark.slow
EXAMPLE = REPOSITORY / "docs" / "examples" / "heads_in_plain_torch.py"
HEADS = {"linear": "linear", "mlp": "mlp", "mlp_v2": {"kind": "mlp_v2", "blocks": 2}, "attention": "attention"}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage with a head of each kind, of normalised features, one of them twice as fine, and class tokens of its own."""
    folder = tmp_path_factory.mktemp("adaptors")
    network = {"kind": "timm", "name": "vit_nano_patch4_32", "image_size": 16, "weights": str(teacher_file(folder))}
    teachers: dict[str, Any] = {name: network | {"head": head} for name, head in HEADS.items()}
    teachers["fine"] = {"kind": "pixels", "name": "patch4", "image_size": 32, "head": {"kind": "mlp", "upsample": 2},
                        "objective": {"kind": "mse"}}
    tree = {name: value for name, value in MIM.items() if name != "teacher"} | {
        "teachers": teachers, "objective": {"kind": "mse", "summary": "cosine"}, "normaliser": {"kind": "phi_s", "every": 1},
        "student": MIM["student"] | {"class_tokens": "per_teacher", "registers": 5}, "run": MIM["run"] | {"epochs": 1},
    }
    run("mim", write_recipe(folder, tree), folder / "run")
    return folder / "run"


def example() -> Any:
    spec = importlib.util.spec_from_file_location("example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def images(count: int = 2, size: int = 32) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_plain_torch_and_timm_say_the_same(stage: Path) -> None:
    model, plain = eva_mim.load(stage), example()
    assert model.adaptors == (*HEADS, "fine")
    found: Any = model(images(), adaptors=model.adaptors)
    trunk = timm.create_model(f"local-dir:{stage}", pretrained=True, num_classes=0).eval()
    mean, std = (torch.tensor(part).view(-1, 1, 1) for part in (model.mean, model.std))
    tokens = trunk.forward_features((images() - mean) / std)
    assert torch.allclose(found["backbone"].spatial, tokens[:, 6:], atol=1e-5)
    assert torch.allclose(found["backbone"].summary, tokens[:, :4].flatten(1), atol=1e-5)  # RADIO: of teachers with a summary
    for name in model.adaptors:
        summary, patches = plain.features(stage, images(), name)
        assert torch.allclose(found[name].spatial, patches, atol=2e-5), name
        if name == "fine":
            assert found[name].summary.shape == (2, 0)
            assert found[name].spatial.shape == (2, 64, 48)
            assert summary is None
        else:
            assert torch.allclose(found[name].summary, summary, atol=2e-5), name
            assert found[name].spatial.shape == (2, 16, 96)
    alone: Any = model(images())
    assert torch.equal(alone.spatial, found["backbone"].spatial)


def test_the_example_runs_without_this_project(stage: Path, tmp_path: Path) -> None:
    Image.new("RGB", (50, 40), "red").save(tmp_path / "red.png")
    blocked = ("import sys; sys.modules['eva_mim'] = None; import runpy; sys.argv = sys.argv[1:]; "
               "runpy.run_path(sys.argv[0], run_name='__main__')")
    folder = shutil.copytree(stage, tmp_path / "copy")
    done = subprocess.run([sys.executable, "-c", blocked, str(EXAMPLE), str(folder), str(tmp_path / "red.png"), "mlp", "fine"],
                          capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["mlp summary (1, 96) patches (1, 16, 96)",
                                        "fine summary None patches (1, 64, 48)"]


@torch.no_grad()
def test_images_of_any_size_that_is_whole_patches(stage: Path) -> None:
    model = eva_mim.load(stage)
    assert model.nearest_size(33, 75) == (32, 72)
    wide: Any = model(torch.rand(1, 3, 24, 40), adaptors=["mlp", "fine"])
    assert wide["mlp"].spatial.shape == (1, 15, 96)
    assert wide["fine"].spatial.shape == (1, 60, 48)
    with pytest.raises(UserError, match="images of 33 x 40 px; the nearest size that it takes is 32 x 40"):
        model(torch.rand(1, 3, 33, 40))
    with pytest.raises(UserError, match="no adaptor sam; it has linear, mlp, mlp_v2, attention, fine"):
        model(torch.rand(1, 3, 32, 32), adaptors=["sam"])
    model.window = 2
    with pytest.raises(UserError, match="window=2, images of 32 x 32 px: it was trained without windows"):
        model(torch.rand(1, 3, 32, 32))


@torch.no_grad()
def test_an_adaptor_is_a_teacher_of_the_next_student(stage: Path, tmp_path: Path) -> None:
    """Two hops: what the student of several teachers says for one of them is what the next one learns."""
    model = eva_mim.load(stage)
    pixels = (255 * images()).round().to(torch.uint8)
    expected: Any = model(pixels / 255, adaptors=["mlp", "fine"])
    for name, grid in (("mlp", (4, 4)), ("fine", (8, 8))):
        teacher = build_teacher(TeacherSettings(kind="stage", name=str(stage), adaptor=name))
        features = teacher(pixels)
        assert teacher.grid == grid
        assert (features.spatial - expected[name].spatial).abs().max() < 1e-4
        assert features.summary.shape == expected[name].summary.shape
    own = build_teacher(TeacherSettings(kind="stage", name=str(stage)))(pixels)
    assert (own.spatial - expected["backbone"].spatial).abs().max() < 1e-4
    for settings, said in (({"adaptor": "sam"}, "has linear, mlp"), ({"adaptor": "mlp", "layer": 1}, "as it was trained")):
        with pytest.raises(UserError, match=said):
            build_teacher(TeacherSettings(kind="stage", name=str(stage), **settings))  # type: ignore[arg-type]
    tree = MIM | {"teacher": {"kind": "stage", "name": str(stage), "adaptor": "mlp"}, "run": MIM["run"] | {"epochs": 1}}
    run("mim", write_recipe(tmp_path, tree), tmp_path / "hop")
    found = records(tmp_path / "hop")
    assert found[-1]["loss"] < found[0]["loss"]
    assert eva_mim.load(tmp_path / "hop").adaptors == ("teacher",)


@torch.no_grad()
def test_other_stages_are_loaded_too(tmp_path: Path) -> None:
    run("clip", write_recipe(tmp_path, CLIP, "clip.yaml"), tmp_path / "clip", "run.epochs=1")
    run("classify", write_recipe(tmp_path, CLASSIFY, "classify.yaml"), tmp_path / "classify", "run.epochs=1")
    model = open_clip.create_model(f"local-dir:{tmp_path / 'clip'}").eval()
    config = open_clip.get_model_preprocess_cfg(model)
    mean, std = (torch.tensor(config[part]).view(-1, 1, 1) for part in ("mean", "std"))
    clip: Any = eva_mim.load(tmp_path / "clip")(images(size=24))
    assert torch.allclose(clip.summary, model.encode_image((images(size=24) - mean) / std), atol=1e-5)
    trunk = timm.create_model(f"local-dir:{tmp_path / 'classify'}", pretrained=True, num_classes=0).eval()
    mean, std = (torch.tensor(trunk.pretrained_cfg[part]).view(-1, 1, 1) for part in ("mean", "std"))
    classify: Any = eva_mim.load(tmp_path / "classify")(images())
    assert torch.allclose(classify.summary, trunk((images() - mean) / std), atol=1e-5)


def test_heads_in_one_onnx_graph(stage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """onnxruntime says what plain torch says; whatever is asked in vain leaves no file."""
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "student.onnx"
    assert main(["convert", str(stage), str(path), "--to", "onnx", "--adaptors", "mlp,attention,fine"]) == 0
    said = capsys.readouterr().out
    assert "attention_summary    [4, 96]" in said
    session = onnxruntime.InferenceSession(str(path))
    found = dict(zip([one.name for one in session.get_outputs()], session.run(None, {"image": images(3).numpy()}), strict=True))
    assert found.keys() == {"summary", "spatial", "mlp_summary", "mlp_spatial", "attention_summary", "attention_spatial",
                            "fine_spatial"}
    for name in ("mlp", "attention", "fine"):
        summary, patches = example().features(stage, images(3), name)
        assert (torch.from_numpy(found[f"{name}_spatial"]) - patches).abs().max() < 1e-4
        assert summary is None or (torch.from_numpy(found[f"{name}_summary"]) - summary).abs().max() < 1e-4
    for words, text in ((["--adaptors", "sam"], "no adaptor sam"), (["--adaptors", "mlp", "--to", "eva"], "goes with --to onnx")):
        assert main(["convert", str(stage), str(tmp_path / "other.onnx"), "--to", "onnx", *words]) == 2
        assert text in capsys.readouterr().err
    assert {file.name for file in tmp_path.iterdir()} == {"student.onnx", "student.onnx.convert.json"}


def test_an_adaptor_is_a_vision_tower_of_transformers(
    stage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another process opens it, also at another size, and LLaVA reads its patches as they are."""
    transformers = pytest.importorskip("transformers")
    for name in ("attention", "fine", "backbone"):
        dst = tmp_path / name
        assert main(["convert", str(stage), str(dst), "--to", "hf", "--adaptors", name]) == 0
        assert f"import eva_mim.convert.tower; transformers.AutoModel.from_pretrained('{dst}')" in capsys.readouterr().out
    code = ("import sys, torch, transformers, eva_mim.convert.tower; m = transformers.AutoModel.from_pretrained(sys.argv[1]); "
            "x = torch.load(sys.argv[2]); torch.save([m(pixel_values=one).last_hidden_state for one in x], sys.argv[2])")
    model = eva_mim.load(stage)
    mean, std = (torch.tensor(part).view(-1, 1, 1) for part in (model.mean, model.std))
    shown = [images(3), images(1, 48)]
    torch.save([(one - mean) / std for one in shown], tmp_path / "images.pt")
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "fine"), str(tmp_path / "images.pt")], check=True)
    for said, one in zip(torch.load(tmp_path / "images.pt"), shown, strict=True):
        wanted: Any = model(one, adaptors=["fine"])
        assert (said - wanted["fine"].spatial).abs().max() < 1e-5

    whole = transformers.AutoModel.from_pretrained(tmp_path / "backbone")(pixel_values=(shown[0] - mean) / std)
    assert torch.allclose(whole.pooler_output, model(shown[0]).summary, atol=1e-5)  # type: ignore[union-attr]
    tower = transformers.AutoModel.from_pretrained(tmp_path / "attention")
    assert (tower.config.hidden_size, tower.config.patch_size, tower.config.adaptor) == (96, 8, "attention")
    words = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 50}
    llava = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(
        vision_config=tower.config, text_config=transformers.LlamaConfig(**words), image_token_index=49,
        vision_feature_layer=-1, vision_feature_select_strategy="full")).eval()
    llava.model.vision_tower.load_state_dict(tower.state_dict())
    text = torch.tensor([[1, *[49] * 16, 2]])
    pixels = transformers.AutoImageProcessor.from_pretrained(tmp_path / "attention")(
        [Image.new("RGB", (40, 32), colour) for colour in ("red", "blue")], return_tensors="pt").pixel_values
    with torch.no_grad():
        said = llava(input_ids=text.repeat(2, 1), pixel_values=pixels).logits
        wanted = model((pixels * std + mean), adaptors=["attention"])
        embedded = llava.get_input_embeddings()(text).repeat(2, 1, 1)
        embedded[:, 1:-1] = llava.model.multi_modal_projector(wanted["attention"].spatial)
        assert (llava(inputs_embeds=embedded).logits - said).abs().max() < 1e-5
    assert said.std(0).max() > 1e-4
    for names, told in (("mlp,fine", "a vision tower is one of backbone, linear, mlp"), ("sam", "a vision tower is one of")):
        assert main(["convert", str(stage), str(tmp_path / "no"), "--to", "hf", "--adaptors", names]) == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_folders_and_heads_that_do_not_fit_are_refused(stage: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        eva_mim.load(tmp_path)
    folder = shutil.copytree(stage, tmp_path / "cut")
    weights = load_file(folder / "head.safetensors")
    save_file({name: value for name, value in weights.items() if name != "head.mlp.3.bias"}, folder / "head.safetensors")
    with pytest.raises(UserError, match=r"head\.mlp\.3\.bias are missing or have another shape than heads\.json says"):
        eva_mim.load(folder)
    (folder / "heads.json").write_text(json.dumps({"teachers": {"a": {"head": {}}}, "single": True}))
    with pytest.raises(UserError, match=r"heads\.json: \('teachers', 'a', 'spatial'\): Field required"):
        eva_mim.load(folder)
