"""Folders that our stages leave, and models under the libraries' real names: converted, and opened by others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models.eva import checkpoint_filter_fn
from torch import Tensor
from torch.nn.functional import normalize

from eva_mim.core.errors import UserError
from eva_mim.core.files import write_json, write_weights
from eva_mim.data.view_settings import MaskSettings
from eva_mim.students import ClassifierSettings, ClipSettings, DecoderSettings, MaskedSettings, TextSettings
from eva_mim.students.classifier import Classifier
from eva_mim.students.clip import ClipStudent, as_open_clip
from eva_mim.students.masked import MaskedStudent
from eva_mim.trunks.pixels import normalise
from eva_mim.weights.export import part, unpooled, write_timm
from eva_mim.weights.handover import read_parent, seed_trunk
from eva_mim.weights.names.dinov2 import to_dinov2
from tests.convert.golden_files import close, converted, same
from tests.convert.test_convert import drawn

CLASSES = ("ant", "bee", "cat", "dog", "eel")
IMAGES = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
LARGE = torch.randint(256, (2, 3, 112, 112), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def filled(student: Any) -> dict[str, Tensor]:
    """Its weights, all drawn; tables that a constructor computed stay."""
    fixed = {name: value for name, value in student.state_dict().items() if "decoder_pos" in name}
    student.load_state_dict(drawn(student) | fixed)
    student.eval()
    return {name: value.detach().clone() for name, value in student.state_dict().items()}


def record(folder: Path, **facts: Any) -> None:
    write_json(folder / "lineage.json", {"finished": True} | facts)


def masked_stage(folder: Path, student: Any, settings: MaskedSettings) -> dict[str, Tensor]:
    """What `pretrain/mim.py` writes at the end of a run."""
    folder.mkdir()
    weights = filled(student)
    write_timm(folder, student.trunk, settings, part(weights, "trunk."), global_pool=unpooled(student.trunk))
    write_weights(folder / "head.safetensors", {name: value for name, value in weights.items() if not name.startswith("trunk.")})
    record(folder, program="mim", grid=list(student.grid))
    return weights


@torch.inference_mode()
def test_a_masked_stage_for_the_original_code(tmp_path: Path) -> None:
    """Its trunk, mask token and head under the original names; timm's own reading of that file says the same. And back."""
    settings = MaskedSettings(name="golden_eva02_b_mim")
    student = MaskedStudent(settings, 64)
    weights = masked_stage(tmp_path / "mim", student, settings)
    _, original = converted(tmp_path / "mim", "eva", tmp_path)
    state = torch.load(original, weights_only=True)["module"]
    assert torch.equal(state["mask_token"], weights["mask_token"])
    assert torch.equal(state["lm_head.weight"], weights["head.weight"])
    assert torch.equal(state["blocks.1.mlp.w1.weight"], weights["trunk.blocks.1.mlp.fc1_g.weight"])
    assert state["rope.freqs_cos"].shape == (64, 24)
    theirs = timm.create_model("golden_eva02_b_mim", num_classes=0, global_pool="token")
    beyond = ("mask_token", "lm_head")
    theirs.load_state_dict(checkpoint_filter_fn({k: v for k, v in state.items() if not k.startswith(beyond)}, theirs))
    close(theirs.eval().forward_features(normalise(LARGE, student.mean, student.std)), student.tokens(LARGE), 2e-5)
    _, again = converted(original, "safetensors", tmp_path)
    for name in ("model.safetensors", "head.safetensors"):
        assert same(load_file(again / name), load_file(tmp_path / "mim" / name))


def test_a_masked_stage_with_a_decoder(tmp_path: Path) -> None:
    """EVA-L's: the decoder is under the original names as well."""
    decoder = DecoderSettings(width=48, depth=2, heads=4)
    settings = MaskedSettings(name="golden_evaL_mae", form="visible", positions="sincos", decoder=decoder)
    student = MaskedStudent(settings, 40, MaskSettings(kind="random", ratio=0.75))
    weights = masked_stage(tmp_path / "mim", student, settings)
    _, original = converted(tmp_path / "mim", "eva", tmp_path)
    state = torch.load(original, weights_only=True)["module"]
    assert torch.equal(state["decoder_pred.weight"], weights["head.weight"])
    assert torch.equal(state["decoder_blocks.1.mlp.fc2.bias"], weights["decoder_blocks.1.mlp.fc2.bias"])
    assert state["decoder_pos_embed"].shape == (1, 65, 48)
    _, again = converted(original, "safetensors", tmp_path)
    for name in ("model.safetensors", "head.safetensors"):
        assert same(load_file(again / name), load_file(tmp_path / "mim" / name))


@torch.inference_mode()
def test_a_converted_folder_is_a_parent_of_our_stages(shared: Path, tmp_path: Path) -> None:
    settings = MaskedSettings(name="golden_eva02_b_mim")
    weights = masked_stage(tmp_path / "mim", MaskedStudent(settings, 64), settings)
    _, original = converted(tmp_path / "mim", "eva", tmp_path)
    _, again = converted(original, "safetensors", tmp_path)
    for source in (tmp_path / "mim", original, again):
        child = MaskedStudent(settings, 64)
        report = seed_trunk(child.trunk, read_parent(source))
        assert same(dict(child.trunk.state_dict()), part(weights, "trunk."))
        assert not report.new + report.resized


def clip_stage(folder: Path, student: ClipStudent, settings: ClipSettings) -> None:
    """What `pretrain/clip.py` writes at the end of a run."""
    folder.mkdir()
    weights = filled(student)
    write_timm(folder, student.trunk, settings, part(weights, "model.visual.trunk."), global_pool=unpooled(student.trunk))
    write_weights(folder / "open_clip_model.safetensors", as_open_clip(part(weights, "model.")))
    write_json(folder / "open_clip_config.json", student.open_clip_config())
    record(folder, program="clip", classes=list(CLASSES))


@torch.inference_mode()
def test_a_clip_stage(tmp_path: Path) -> None:
    """Whole for open_clip, its tower for timm."""
    settings = ClipSettings(name="vit_nano_patch4_32", embed_dim=24, pool="token", text=TextSettings(width=32, layers=1, heads=2))
    student = ClipStudent(settings)
    clip_stage(tmp_path / "clip", student, settings)
    texts = student.tokenizer()(["a small cat", "two dogs and an eel in the rain"])
    found, dst = converted(tmp_path / "clip", "hf", tmp_path)
    assert found["source"]["container"] == "open_clip_model"
    model = eval(found["open_with"], {"open_clip": open_clip}).eval()
    images = normalise(IMAGES, student.mean, student.std)
    close(model.encode_image(images, normalize=True), student.encode_image(IMAGES), 1e-5)
    close(model.encode_text(texts, normalize=True), student.encode_text(texts), 1e-5)
    assert open_clip.get_tokenizer(f"local-dir:{dst}")(["a small cat"]).shape == (1, 24)
    found, _ = converted(tmp_path / "clip", "timm", tmp_path)
    trunk = eval(found["open_with"], {"timm": timm}).eval()
    close(normalize(student.model.visual.head(trunk(images)), dim=-1), student.encode_image(IMAGES), 1e-5)
    with pytest.raises(UserError, match=r"the original EVA code has no place for visual\.head\.proj\.weight"):
        converted(tmp_path / "clip", "eva", tmp_path)


def classifier_stage(folder: Path, settings: ClassifierSettings) -> Classifier:
    """What `finetune/classify.py` writes at the end of a run."""
    folder.mkdir()
    student = Classifier(settings, len(CLASSES))
    weights = filled(student)
    write_timm(folder, student.trunk, settings, student.timm_weights(weights), classes=CLASSES, global_pool=settings.global_pool)
    record(folder, program="classify", classes=list(CLASSES))
    return student


@torch.inference_mode()
def test_a_classifier_with_its_classes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    student = classifier_stage(tmp_path / "classify", ClassifierSettings(name="vit_nano_patch4_32", global_pool="token"))
    images, answers = normalise(IMAGES, student.mean, student.std), student(IMAGES)
    found, dst = converted(tmp_path / "classify", "hf", tmp_path)
    close(eval(found["open_with"], {"timm": timm}).eval()(images), answers, 1e-5)
    assert json.loads((dst / "config.json").read_text())["label_names"] == list(CLASSES)
    model = transformers.AutoModelForImageClassification.from_pretrained(dst).eval()
    close(model(pixel_values=images).logits, answers, 1e-5)
    assert model.config.id2label == dict(enumerate(CLASSES))
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in IMAGES]
    given = transformers.AutoImageProcessor.from_pretrained(dst)(pictures, return_tensors="pt").pixel_values
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(eval(found["open_with"], {"timm": timm})))
    close(given, torch.stack([transform(picture) for picture in pictures]), 1e-5)


FIVE = {"mean": (0.1, 0.2, 0.3, 0.4, 0.5), "std": (0.5, 0.4, 0.3, 0.2, 0.1)}
BANDS = torch.randint(256, (3, 5, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


@torch.inference_mode()
def test_a_classifier_of_five_channels(tmp_path: Path) -> None:
    """As a folder and as a file for timm, and under the original names, and transformers' own names are CLIP's."""
    student = classifier_stage(tmp_path / "classify", ClassifierSettings(name="vit_nano_patch4_32", **FIVE))
    images, answers = normalise(BANDS, student.mean, student.std), student(BANDS)
    for to in ("hf", "timm"):
        found, dst = converted(tmp_path / "classify", to, tmp_path)
        close(eval(found["open_with"], {"timm": timm}).eval()(images), answers, 1e-5)
        if to == "hf":
            told = json.loads((dst / "config.json").read_text())["pretrained_cfg"]
            assert told["input_size"] == [5, 32, 32]
            assert (told["mean"], told["std"]) == (list(FIVE["mean"]), list(FIVE["std"]))
    settings = ClassifierSettings(name="vit_nano_patch4_32", **FIVE).model_dump(mode="json")
    record(tmp_path / "classify", program="classify", classes=list(CLASSES), settings={"student": settings})
    (tmp_path / "classify" / "config.json").unlink()  # a checkpoint has none: the record says it
    (tmp_path / "classify").rename(tmp_path / "step")
    found, _ = converted(tmp_path / "step", "timm", tmp_path)
    close(eval(found["open_with"], {"timm": timm}).eval()(images), answers, 1e-5)
    _, original = converted(tmp_path / "step", "eva", tmp_path)
    state = torch.load(original, weights_only=True)["module"]
    assert torch.equal(state["patch_embed.proj.weight"], student.state_dict()["trunk.patch_embed.proj.weight"])
    masked = MaskedSettings(name="vit_nano_patch4_32", **FIVE)
    masked_stage(tmp_path / "mim", MaskedStudent(masked, 8), masked)
    _, dst = converted(tmp_path / "mim", "transformers", tmp_path)
    assert json.loads((dst / "config.json").read_text())["num_channels"] == 5


@pytest.mark.slow
@pytest.mark.parametrize("channels", [pytest.param(3, marks=pytest.mark.long), 5])
@torch.inference_mode()
def test_a_classifier_of_patches_for_onnxruntime(tmp_path: Path, channels: int) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    pixels, shown = (FIVE, BANDS) if channels == 5 else ({}, IMAGES)
    student = classifier_stage(tmp_path / "classify", ClassifierSettings(name="vit_nano_patch4_32", **pixels))
    found, _ = converted(tmp_path / "classify", "onnx", tmp_path)
    session = eval(found["open_with"], {"onnxruntime": onnxruntime})
    images = normalise(shown, student.mean, student.std)
    for batch in (images, images[:1]):
        said = dict(zip([o.name for o in session.get_outputs()], session.run(None, {"image": batch.numpy()}), strict=True))
        close(torch.tensor(said["output"]), student(shown)[: len(batch)], 1e-5)
    with pytest.raises(Exception, match=r"INVALID_ARGUMENT|Got invalid dimensions"):
        session.run(None, {"image": torch.zeros(1, channels, 64, 64).numpy()})


def test_a_convolutional_stage_goes_to_timm_alone(tmp_path: Path) -> None:
    """Its configuration says which it is; the original code has no such network."""
    student = classifier_stage(tmp_path / "classify", ClassifierSettings(name="convnet_nano_32"))
    found, _ = converted(tmp_path / "classify", "timm", tmp_path)
    with torch.inference_mode():
        model = eval(found["open_with"], {"timm": timm}).eval()
        close(model(normalise(IMAGES, student.mean, student.std)), student(IMAGES), 1e-5)
    with pytest.raises(UserError, match=r"convnet_nano_32 is (no model of the original code|not known under names)"):
        converted(tmp_path / "classify", "eva", tmp_path)
    with pytest.raises(UserError, match="only OpenAI's CLIP and plain ViTs have names of their own there; use --to hf"):
        converted(tmp_path / "classify", "transformers", tmp_path)
    with pytest.raises(UserError, match="has no patches whose positions could be resized"):
        converted(tmp_path / "classify", "hf", tmp_path, image_size=(64, 64))


# real names


@pytest.mark.slow
@torch.inference_mode()
def test_a_published_architecture(tmp_path: Path) -> None:
    """EVA-02 Ti: 5.5 million parameters, from the original names by shapes alone."""
    torch.manual_seed(0)
    model = timm.create_model("eva02_tiny_patch14_224", num_classes=0, global_pool="token").eval()
    save_file(dict(model.state_dict()), tmp_path / "tiny.safetensors")
    _, original = converted(tmp_path / "tiny.safetensors", "eva", tmp_path)
    found, _ = converted(original, "timm", tmp_path)
    line = "timm.create_model('eva02_tiny_patch14_224', num_classes=0, global_pool='token', checkpoint_path="
    assert found["open_with"].startswith(line)
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    close(eval(found["open_with"], {"timm": timm}).eval()(images), model(images), 2e-5)


@pytest.mark.slow
@pytest.mark.long
@torch.inference_mode()
def test_a_published_clip_model(tmp_path: Path) -> None:
    """EVA02-CLIP-B: 150 million parameters, from the original names by shapes alone; the file as Hugging Face has it."""
    torch.manual_seed(0)
    model = open_clip.create_model("EVA02-B-16").eval()
    torch.save(dict(model.state_dict()), tmp_path / "b.pt")
    _, original = converted(tmp_path / "b.pt", "eva", tmp_path)
    assert "visual.blocks.0.attn.inner_attn_ln.weight" in torch.load(original, weights_only=True, mmap=True)
    found, dst = converted(original, "open_clip", tmp_path)
    assert found["open_with"] == f"open_clip.create_model_and_transforms('EVA02-B-16', pretrained='{dst}')"
    theirs = eval(found["open_with"], {"open_clip": open_clip})[0].eval()
    images, texts = torch.randn(1, 3, 224, 224), open_clip.tokenize(["a photo of a cat"])
    close(theirs.encode_image(images), model.encode_image(images), 1e-5)
    close(theirs.encode_text(texts), model.encode_text(texts), 1e-5)


@pytest.mark.parametrize("more", [{}, {"registers": 3, "class_tokens": "per_teacher"}])
@torch.inference_mode()
def test_a_masked_student_as_the_vision_tower_of_llava(tmp_path: Path, more: dict[str, Any]) -> None:
    """In transformers, with no help of ours: its tokens are timm's at its own size and at another, and LLaVA reads them."""
    transformers = pytest.importorskip("transformers")
    settings = MaskedSettings(name="vit_nano_patch4_32", **more)
    student = MaskedStudent(settings, 8)
    for value in student.parameters():  # positions, scales and norms are not those of a new model
        value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
    masked_stage(tmp_path / "mim", student, settings)
    _, dst = converted(tmp_path / "mim", "transformers", tmp_path)
    tower, info = transformers.AutoModel.from_pretrained(dst, output_loading_info=True)
    assert {kind: list(names) for kind, names in info.items() if names} == {}
    trunk = timm.create_model(f"local-dir:{tmp_path / 'mim'}", pretrained=True, num_classes=0, dynamic_img_size=True).eval()
    images = normalise(IMAGES, student.mean, student.std)
    for shown in (images, torch.nn.functional.interpolate(images, (48, 40))):
        close(tower.eval()(pixel_values=shown).last_hidden_state, trunk.forward_features(shown), 1e-5)

    words = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 50}
    llava = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(
        vision_config=tower.config, text_config=transformers.LlamaConfig(**words), image_token_index=49)).eval()
    llava.model.vision_tower.load_state_dict(tower.state_dict())
    patches = 64 + more.get("registers", 0)  # LLaVA leaves out the first token alone
    text = torch.tensor([[1, *[49] * patches, 2]])
    tokens = trunk.forward_intermediates(images, indices=[-2], norm=False, output_fmt="NLC", intermediates_only=True,
                                         return_prefix_tokens=True)[0]
    embedded = llava.get_input_embeddings()(text).repeat(len(images), 1, 1)
    embedded[:, -65:-1] = llava.model.multi_modal_projector(tokens[0])
    embedded[:, 1:-65] = llava.model.multi_modal_projector(tokens[1][:, 1:])
    said = llava(input_ids=text.repeat(len(images), 1), pixel_values=images).logits
    close(llava(inputs_embeds=embedded).logits, said, 1e-5)
    assert said.std(0).max() > 1e-3


def test_a_vit_without_positions_is_no_dinov2() -> None:
    trunk = timm.create_model("vit_nano_patch4_32", num_classes=0, pos_embed="none")
    with pytest.raises(UserError, match="the model has no positions, and DINOv2 there has a table of them; use --to hf"):
        to_dinov2(trunk.state_dict(), trunk)


def test_a_classifier_s_head_has_no_place_in_dinov2(tmp_path: Path) -> None:
    classifier_stage(tmp_path / "classify", ClassifierSettings(name="vit_nano_patch4_32"))
    with pytest.raises(UserError, match=r"it has fc_norm\.bias, .*head\.weight, and DINOv2 there has not"):
        converted(tmp_path / "classify", "transformers", tmp_path)
