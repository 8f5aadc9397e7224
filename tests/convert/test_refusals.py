"""What is not converted: the error says why, and nothing is left on the disk; what was there before stays."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import eva_mim.convert.convert as convert_module
import eva_mim.convert.writers as writers_module
import eva_mim.weights.names.translate as source_module
from eva_mim.convert.convert import Options, convert
from eva_mim.convert.parity import sample_images
from eva_mim.core.errors import UserError
from eva_mim.trunks.pixels import normalise
from eva_mim.weights.files.lazy import materialise
from eva_mim.weights.names.eva import Converted
from tests.conftest import make_folder
from tests.convert.golden_files import CLIPS, clip_config, converted, golden, known_to_open_clip, written
from tests.convert.test_convert import left, opened
from tests.ranks import Launched, script
from tests.students.golden import MEAN, STD


@pytest.fixture
def classifier(shared: Path, tmp_path: Path) -> Path:
    """eva02_b_cls: a registered architecture has its names and shapes."""
    return written(golden(shared, "eva02_b_cls"), tmp_path)


def refused(source: Path, to: str, match: str, name: str = "", **options: Any) -> None:
    """Nothing new in the folder."""
    before = left(source.parent)
    with pytest.raises(UserError, match=match):
        converted(source, to, source.parent, name, **options)
    assert left(source.parent) == before


# mistakes in the conversion itself

Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def swapped(one: str, other: str) -> Change:
    """Two blocks change places."""
    def change(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        places = {one: other, other: one}
        found = {name: next((part for part in places if part in name), "") for name in weights}
        return {name: weights[name.replace(part, places[part]) if part else name] for name, part in found.items()}

    return change


def shifted(wanted: str, by: float = 1e-2) -> Change:
    """One element of one bias is a little off."""
    def change(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        value = materialise(weights[wanted]).clone()
        value[0] += by
        return weights | {wanted: value}

    return change


MISTAKES: dict[str, tuple[str, str, Change]] = {
    "blocks": ("eva02_b_cls", "timm", swapped("blocks.0.", "blocks.1.")),
    "gate and value": ("eva02_b_cls", "hf", swapped("mlp.fc1_g.", "mlp.fc1_x.")),
    "a bias": ("eva02_b_cls", "timm", shifted("blocks.1.attn.proj.bias")),
    "a norm": ("eva01_relpos", "safetensors", swapped("norm1.", "norm2.")),
    "positions": ("eva01_mim", "timm", lambda weights: weights | {"pos_embed": weights["pos_embed"].flip(1)}),
    "text blocks": ("clip_eva02_b", "open_clip", swapped("text.transformer.resblocks.0.", "text.transformer.resblocks.1.")),
    "scale": ("clip_eva01_g", "open_clip", lambda weights: weights | {"logit_scale": weights["logit_scale"] + 1e-3}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_renaming_is_found_out(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: str) -> None:
    name, to, change = MISTAKES[mistake]
    found = golden(shared, name)
    with known_to_open_clip(tmp_path, **({"golden": clip_config(found)} if name in CLIPS else {})):
        source = written(found, tmp_path)
        before = source_module.from_eva

        def wrong(*given: Any) -> Converted:
            done = before(*given)
            return Converted(change(done.weights), done.report, done.outside, done.rope, done.grid)

        monkeypatch.setattr(source_module, "from_eva", wrong)
        refused(source, to, r"the result differ from the source's; nothing was written(.|\n)*more than 2e-05 of it", name)


def test_a_wrong_way_back_is_found_out(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into the original's names, of a trunk; and what parity cannot see, because no output depends on it."""
    source = written(golden(shared, "eva02_s_mim"), tmp_path)
    before = writers_module.to_eva
    for change, match in (
        (swapped("blocks.0.norm1", "blocks.1.norm1"), "more than 2e-05 of it"),
        (shifted("mask_token"), "mask_token was not written as it is in the source"),
        (shifted("lm_head.bias", 1e-6), "head.bias was not written as it is in the source"),
    ):
        def wrong(*given: Any, change: Change = change, **options: Any) -> Converted:
            done = before(*given, **options)
            return Converted(change(done.weights), done.report)

        monkeypatch.setattr(writers_module, "to_eva", wrong)
        refused(source, "eva", match)


# interruptions


@pytest.mark.parametrize("moment", ["write", "prove"])
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("to", ["timm", "hf"])
def test_an_interruption_leaves_what_was_there(
    tmp_path: Path, classifier: Path, monkeypatch: pytest.MonkeyPatch, moment: str, old: bool, to: str
) -> None:
    if old:
        converted(classifier, to, tmp_path, dtype="float16")
    before, there = contents(tmp_path), left(tmp_path)
    real_write = writers_module.write_safetensors

    def stop(path: Any, *given: Any, **options: Any) -> None:
        if moment == "write":
            real_write(path, *given, **options)
        raise KeyboardInterrupt

    if moment == "write":
        monkeypatch.setattr(writers_module, "write_safetensors", stop)
    else:
        monkeypatch.setattr(convert_module, "prove", stop)
    with pytest.raises(KeyboardInterrupt):
        converted(classifier, to, tmp_path, overwrite=old)
    assert (contents(tmp_path), left(tmp_path)) == (before, there)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_killed_conversion_leaves_no_result(tmp_path: Path, classifier: Path) -> None:
    """SIGKILL while the result is proved: it lies in a hidden folder then, and nothing has its name."""
    code = (
        "import os, signal, sys; import tests.students.golden; import eva_mim.convert.convert as c; "
        "c.prove = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL); "
        "from pathlib import Path; c.convert(Path(sys.argv[1]), Path(sys.argv[2]), 'timm')"
    )
    dst = tmp_path / "result.safetensors"
    assert Launched(script, code, str(classifier), str(dst)).wait(200) == -signal.SIGKILL
    assert not dst.exists()
    others = left(tmp_path) - {classifier.name}
    assert len(others) == 1
    assert others.pop().startswith(".result.safetensors.")
    assert convert(classifier, dst, "timm")["files"].keys() == {dst.name}


# the destination


@pytest.mark.parametrize("to", ["timm", "hf"])
def test_a_result_is_replaced_only_where_that_is_asked_for(tmp_path: Path, classifier: Path, to: str) -> None:
    _, dst = converted(classifier, to, tmp_path)
    file = dst / "model.safetensors" if to == "hf" else dst
    wide, there = file.read_bytes(), left(tmp_path)
    with pytest.raises(UserError, match=r"exists; add --overwrite to replace it"):
        converted(classifier, to, tmp_path, dtype="float16")
    with pytest.raises(UserError, match="nothing was written"):
        converted(classifier, to, tmp_path, dtype="bfloat16", bound=1e-9, overwrite=True)
    assert file.read_bytes() == wide
    record, _ = converted(classifier, to, tmp_path, dtype="float16", overwrite=True)
    assert {value.dtype for value in load_file(file).values()} == {torch.float16}
    assert record["rules"]["dtype"] == "float16"
    assert left(tmp_path) == there


def test_what_no_conversion_wrote_is_not_replaced(tmp_path: Path, classifier: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"was not written by a conversion \(no convert.json in it\); it is not replaced"):
        convert(classifier, mine, "hf", Options(overwrite=True))
    with pytest.raises(UserError, match="is the source itself"):
        convert(classifier, classifier, "eva", Options(overwrite=True))
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(UserError, match="is a folder, and --to timm writes the other"):
        convert(classifier, tmp_path / "folder.safetensors", "timm", Options(overwrite=True))
    assert left(mine) == {"thesis.txt"}


@pytest.mark.parametrize(("to", "name", "match"), [
    ("timm", "x", r"writes a file; name it x\.safetensors or x\.pt"), ("eva", "x.safetensors", r"name it x\.pt or x\.pth"),
    ("onnx", "x.pt", r"name it x\.onnx"), ("hf", "x.safetensors", "writes a folder; name it .*x$"),
    ("transformers", "x.bin", "writes a folder"),
])
def test_the_ending_of_the_result_s_name(tmp_path: Path, classifier: Path, to: str, name: str, match: str) -> None:
    with pytest.raises(UserError, match=match):
        convert(classifier, tmp_path / name, to)
    assert left(tmp_path) == {classifier.name}


def test_folders_above_the_result_are_made(tmp_path: Path, classifier: Path) -> None:
    convert(classifier, tmp_path / "a" / "b" / "trunk.safetensors", "timm")
    assert left(tmp_path / "a" / "b") == {"trunk.safetensors", "trunk.safetensors.convert.json"}


# what a source lacks


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(shared: Path, tmp_path: Path, value: float) -> None:
    found = golden(shared, "eva02_b_cls")
    found.state["blocks.1.norm2.bias"][3] = value
    refused(written(found, tmp_path), "timm", r"NaN or infinite: \d+ numbers of the source")


def test_what_nothing_tells_is_asked_for(shared: Path, tmp_path: Path) -> None:
    source = written(golden(shared, "clip_bige_visual"), tmp_path)
    asked = r"--architecture eva_giant_patch14_224 .*embed_dim=84 --argument depth=2 .*mlp_ratio=8.5714286 .*num_heads=N"
    refused(source, "timm", rf"at its own size; say --image-size N, or name one of its kind, .*: {asked}")
    refused(source, "timm", rf"these names and shapes; name one of its kind, .*: {asked}", image_size=(84, 84))
    refused(source, "timm", "--architecture: timm has no 'eva_giant'; did you mean ", architecture="eva_giant")
    refused(source, "timm", "12 blocks|2 blocks, but|not those of eva_giant_patch14_224: .*; give the differences",
            architecture="eva_giant_patch14_224")
    refused(source, "hf", r"timm cannot build .*no_such", architecture="eva_giant_patch14_224", arguments={"no_such": 1})
    with pytest.raises(UserError, match=r"nothing\.pt does not exist"):
        convert(tmp_path / "nothing.pt", tmp_path / "x.pt", "timm")


def test_heads_that_contradict_the_tables_are_refused(shared: Path, tmp_path: Path) -> None:
    """Parity would not see it: both sides would have them."""
    refused(written(golden(shared, "eva02_b_cls"), tmp_path), "timm", "num_heads=8: the position tables .* are of 4 heads",
            arguments={"num_heads": 8})


def test_one_of_several_architectures_has_to_be_named(tmp_path: Path) -> None:
    """Two of timm's that differ in mean and std alone."""
    import timm

    torch.manual_seed(0)
    weights = timm.create_model("deit_tiny_patch16_224", depth=12, num_classes=2).state_dict()
    save_file(weights, tmp_path / "tiny.safetensors")
    refused(tmp_path / "tiny.safetensors", "timm", r"name one with --architecture: vit_tiny_\S+, deit_tiny_\S+ \(mean")


@pytest.mark.parametrize(("change", "lacks"), [
    (lambda state: {name.replace("relative_position_bias_table", "relative_position_bias_for_high"): value
                    for name, value in state.items() if "index" not in name}, "decoupled relative positions"),
    (lambda state: state | {f"blocks.{n}.attn.qkv.bias": torch.zeros(144) for n in (0, 1)}, "k bias|qkv.bias"),
    (lambda state: state | {"side_adapter.weight": torch.zeros(3)}, "1 tensors belong to no model .*: side_adapter"),
    (lambda state: {name: value for name, value in state.items() if "blocks.1.mlp.fc1" not in name}, r"blocks\.1.*mlp\.fc1"),
])
def test_what_timm_cannot_represent_is_named(shared: Path, tmp_path: Path, change: Any, lacks: str) -> None:
    found = golden(shared, "eva01_relpos")
    source = tmp_path / "strange.pt"
    torch.save({"module": change(found.state)}, source)
    refused(source, "timm", lacks)


@pytest.mark.parametrize(("name", "to", "options", "match"), [
    ("eva02_b_cls", "open_clip", {}, "no text tower here.*use --to timm or hf"),
    ("eva02_b_cls", "onnx", {"dtype": "float16"}, "graphs are written in float32"),
    ("openai_visual", "transformers", {"image_size": (112, 168), "grid": (8, 8)}, r"images of \(112, 168\) are not square"),
    ("eva02_b_cls", "timm", {"image_size": (100, 112)}, "100x112 is no multiple of the patch 14x14"),
    ("eva02_b_cls", "timm", {"grid": (4, 16)}, r"--grid: \(4, 16\) patches, but the source has \(8, 8\)"),
    ("clip_eva02_b", "hf", {"norm": "copy"}, "--norm copy: a CLIP model keeps its norm; convert the tower with --to timm"),
    ("clip_eva02_b", "hf", {"arguments": {"num_heads": 4}}, "no place for keywords of timm"),
    ("clip_bige_visual", "transformers", {}, "only OpenAI's CLIP and plain ViTs have names of their own there; use --to hf"),
])
def test_what_a_format_or_a_model_has_no_place_for(
    shared: Path, tmp_path: Path, name: str, to: str, options: dict[str, Any], match: str
) -> None:
    found = golden(shared, name)
    with known_to_open_clip(tmp_path, **({"golden": clip_config(found)} if name in CLIPS else {})):
        refused(written(found, tmp_path), to, match, name, **options)


# the proof


def test_the_bound_is_the_user_s(tmp_path: Path, classifier: Path) -> None:
    """The same numbers in another file differ by nothing; rounded ones do."""
    assert converted(classifier, "timm", tmp_path, bound=0.0)[0]["parity"]["source and result"]["bound"] == 0
    with pytest.raises(UserError, match=r"more than 0\.0001 of it"):
        converted(classifier, "hf", tmp_path, dtype="bfloat16", bound=1e-4)
    assert not (tmp_path / "eva02_b_cls-hf").exists()


def test_the_user_s_images_are_what_goes_through(shared: Path, tmp_path: Path, classifier: Path) -> None:
    folder = make_folder(tmp_path / "pictures", {"cat": 2, "dog": 1}, (150, 120))
    record, _ = converted(classifier, "timm", tmp_path, images=folder)
    found = record["parity"]["source and result"]["outputs"]["answer"]
    with torch.inference_mode():
        answers = opened(record)(normalise(sample_images((112, 112), folder), MEAN, STD))
    assert found["shape"] == (3, 33)
    assert found["source"] == pytest.approx(float(answers.abs().max()), rel=1e-6)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        converted(classifier, "hf", tmp_path, images=tmp_path / "empty")
    assert not (tmp_path / "eva02_b_cls-hf").exists()
