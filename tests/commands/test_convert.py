"""`eva-mim convert`: arguments, what is printed, exit codes."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

import eva_mim.commands.convert as command
from eva_mim.cli import main
from eva_mim.convert import parity
from eva_mim.convert.convert import Options
from eva_mim.convert.targets import FORMATS
from eva_mim.weights import resize
from eva_mim.weights.files.write import FLOATING
from tests.conftest import REPOSITORY
from tests.convert.golden_files import golden, written


@pytest.fixture
def source(shared: Path, tmp_path: Path) -> Path:
    return written(golden(shared, "eva01_mim"), tmp_path)


def ran(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    """What is printed, on the output for success and on the error output else; never a traceback."""
    capsys.readouterr()
    assert main(["convert", *map(str, arguments)]) == code
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert (out == "") == (code != 0)
    return out if code == 0 else err


def test_the_table(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dst = tmp_path / "trunk.safetensors"
    lines = ran(capsys, source, dst, "--to", "timm").splitlines()
    assert [line for line in lines if not line.startswith(("parity", " "))] == [
        f"source     {source}  (torch, module, names of eva)",
        "model      timm golden_eva01_mim num_classes=0 global_pool=token",
        "image      112 x 112 px, 8 x 8 patches",
        f"written    {dst}  (trunk.safetensors)",
        "loaded     45 tensors",
        "ignored    lm_head.bias, lm_head.weight, mask_token: outside a masked model's trunk: this format has no place for it",
        f"open with  timm.create_model('golden_eva01_mim', num_classes=0, global_pool='token', checkpoint_path='{dst}')",
    ]
    assert "parity     source and result (bound 2e-05 of the largest value):" in lines
    tokens = next(line for line in lines if line.strip().startswith("tokens"))
    assert re.fullmatch(r" {11,}tokens +\(4, 65, 88\) +largest difference 0 of 5\.46, cosine 1\.000000", tokens)


def test_the_table_of_a_changed_model(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = ran(capsys, source, tmp_path / "x.pth", "--to", "timm", "--image-size", "168x112", "--positions", "original",
               "--norm", "drop", "--dtype", "bfloat16")
    assert "resized    pos_embed: [1, 65, 88] to [1, 97, 88], rule original\n" in text
    assert "new        fc_norm.bias, fc_norm.weight: norm=drop: fresh, ones and zeros\n" in text
    assert "image      168 x 112 px, 12 x 8 patches\n" in text
    assert "change     cosine of each image's answer before and after it: [" in text


def test_json_is_the_record(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = json.loads(ran(capsys, source, tmp_path / "folder", "--to", "safetensors", "--json"))
    assert printed == json.loads((tmp_path / "folder" / "convert.json").read_text())
    assert printed["open_with"] == f"init_from={tmp_path / 'folder'}"
    assert set(printed["files"]) == {f"folder/{name}" for name in ("config.json", "head.safetensors", "model.safetensors")}


def test_every_argument_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each field of Options, none of which is left at its default."""
    import eva_mim.convert.convert as module

    given: list[Any] = []

    def convert(*arguments: Any) -> dict[str, Any]:
        given.extend(arguments)
        return {}

    monkeypatch.setattr(module, "convert", convert)
    ran(capsys, "a.pt", "b", "--to", "hf", "--container", "model_ema", "--architecture", "name", "--argument", "num_heads=16",
        "--argument", "use_post_norm=true", "--argument", "ref_feat_shape=[16, 16]", "--argument", "act_layer=gelu",
        "--grid", "8x9", "--image-size", "224",
        "--patch-size", "16", "--positions", "original", "--kernel", "bicubic", "--norm", "copy",
        "--dtype", "float16", "--images", "pictures", "--max-difference", "1e-3", "--overwrite", "--json")
    src, dst, to, options = given
    assert (src, dst, to) == (Path("a.pt"), Path("b"), "hf")
    assert options == Options(
        container="model_ema", architecture="name",
        arguments={"num_heads": 16, "use_post_norm": True, "ref_feat_shape": [16, 16], "act_layer": "gelu"}, grid=(8, 9),
        image_size=(224, 224), patch_size=16, positions="original", kernel="bicubic", norm="copy", dtype="float16",
        images=Path("pictures"), bound=1e-3, overwrite=True,
    )
    assert all(getattr(options, field.name) != getattr(Options(), field.name) for field in fields(Options))


@pytest.mark.parametrize(("arguments", "said"), [
    (["--image-size", "big"], "argument --image-size: 'big' is no whole number from 1 to 10000"),
    (["--image-size", "0"], "'0' is no whole number"),
    (["--image-size", "224x"], "'' is no whole number"),
    (["--image-size", "224x3.5"], "'3.5' is no whole number"),
    (["--image-size", "1x2x3"], "'1x2x3' is neither N nor HxW"),
    (["--image-size", "-14"], "--image-size"),
    (["--grid", "20000"], "'20000' is no whole number from 1 to 10000"),
    (["--patch-size", "x"], "argument --patch-size: 'x' is no whole number"),
    (["--patch-size", "0"], "'0' is no whole number"),
    (["--patch-size", "-16"], "--patch-size"),
    (["--dtype", "int8"], "invalid choice: 'int8'"),
    (["--max-difference", "small"], "'small' is no number from 0 to 1"),
    (["--max-difference", "nan"], "'nan' is no number from 0 to 1"),
    (["--max-difference", "1.5"], "'1.5' is no number from 0 to 1"),
    (["--positions", "nearest"], "invalid choice: 'nearest'"),
])
def test_a_mistyped_argument(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["convert", "a", "b", "--to", "hf", *arguments])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_the_format_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in ([], "required: --to"), (["--to", "tensorflow"], "invalid choice: 'tensorflow'"):
        with pytest.raises(SystemExit) as ended:
            main(["convert", "a", "b", *arguments])
        assert ended.value.code == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "said"), [
    (["--argument", "num_heads"], "--argument num_heads: not of the form NAME=VALUE"),
    (["--argument", "=4"], "--argument =4: not of the form NAME=VALUE"),
    (["--argument", "num-heads=4"], "not of the form NAME=VALUE"),
    (["--argument", "num_heads=[4"], "--argument num_heads=[4: while parsing a flow sequence"),
    (["--argument", "num_heads={a: 1}"], "--argument num_heads: {'a': 1} is not a plain value"),
    (["--argument", "checkpoint_path=x"], "--argument checkpoint_path: not a size or part of a model"),
    (["--argument", "num_heads=100000"], "out of bounds"),
    (["--images", "no/such/folder"], "no/such/folder"),
])
def test_what_an_argument_says_is_refused(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    text = ran(capsys, source, tmp_path / "x", "--to", "hf", *arguments, code=2)
    assert text.startswith("error: ")
    assert said in text
    assert {item.name for item in tmp_path.iterdir()} == {source.name}


def test_failures_end_with_code_2_and_text(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = ran(capsys, tmp_path / "none.pt", tmp_path / "x", "--to", "hf", code=2)
    assert missing == f"error: {tmp_path / 'none.pt'} does not exist\n"
    (tmp_path / "broken.pt").write_bytes(source.read_bytes()[:5000])
    assert ran(capsys, tmp_path / "broken.pt", tmp_path / "x", "--to", "hf", code=2).count("\n") == 1
    assert "use --to timm or hf" in ran(capsys, source, tmp_path / "x.pt", "--to", "open_clip", code=2)
    unproved = ran(capsys, source, tmp_path / "x", "--to", "hf", "--dtype", "float16", "--max-difference", "0", code=2)
    assert "the outputs of the result differ from the source's; nothing was written" in unproved
    (tmp_path / "file").write_text("")
    assert ran(capsys, source, tmp_path / "file" / "x", "--to", "hf", code=2).startswith("error: ")


def test_ctrl_c(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import eva_mim.convert.convert as module

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "prove", stop)
    assert ran(capsys, source, tmp_path / "x", "--to", "hf", code=130) == "interrupted\n"
    assert {item.name for item in tmp_path.iterdir()} == {source.name}


def test_choices_are_those_of_the_modules_behind() -> None:
    for form in FORMATS.values():
        assert callable(form.writer())
        assert callable(form.runner())
    assert set(command.DTYPES) <= set(FLOATING) & set(parity.BOUNDS)
    assert all(hasattr(torch, dtype) for dtype in command.DTYPES)
    text = inspect.getsource(command.main)
    for rule in (resize.PositionRule, resize.KernelRule):
        assert all(f'"{choice}"' in text for choice in rule.__args__)  # type: ignore[attr-defined]
    assert all(re.search(rf"^  {to} ", command.DESCRIPTION, re.MULTILINE) for to in FORMATS)


def test_the_bounds_in_the_help_are_those_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    said = re.search(r"default (\S+), float16 (\S+), bfloat16 ([0-9.e-]+)", text)
    assert said
    assert [float(value) for value in said.groups()] == [parity.BOUNDS[name] for name in ("float32", "float16", "bfloat16")]


def test_help_answers_without_torch() -> None:
    """As quickly as a mistyped argument is answered."""
    code = "import sys\nfrom eva_mim.cli import main\ntry: main(['convert', *sys.argv[1:]])\nexcept SystemExit: pass\n" \
           "assert not {'torch', 'timm', 'open_clip'} & set(sys.modules), 'heavy'"
    for arguments in (["--help"], ["a", "b", "--to", "nothing"]):
        line = [sys.executable, "-c", code, *arguments]
        ended = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        assert "--max-difference" in ended.stdout + ended.stderr
