"""What a student learns of several teachers: summaries, normalised features, finer grids and visible patches, in real runs."""

from __future__ import annotations

import json
import random
import runpy
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.nn import functional as F

import eva_mim.trunks.small  # noqa: F401
from eva_mim.data.class_lists import spoken
from eva_mim.data.source_settings import SceneSettings
from eva_mim.data.sources.scenes import SceneSource
from eva_mim.data.views import EvalView
from tests.conftest import REPOSITORY
from tests.tiny import CLIP, MIM, finish, losses, python, records, run, run_until, same_weights, teacher_file, write_recipe

pytestmark = pytest.mark.slow
ROUNDING = 5e-5
"""Largest difference of an fp32 loss of order 1."""


def three(folder: Path) -> dict[str, Any]:
    """A network whose summary is learned by its angle, in PHI-S; pixels of a grid twice as fine, each channel by itself; and a
    network of which the summary alone is learned."""
    network = {"kind": "timm", "name": "vit_nano_patch4_32", "image_size": 16, "weights": str(teacher_file(folder))}
    teachers = {
        "vit": network | {"objective": {"kind": "mse", "summary": "angle", "summary_weight": 0.3},
                          "normaliser": {"kind": "phi_s", "steps": 3, "every": 1}},
        "pixels": {"kind": "pixels", "name": "patch4", "image_size": 32, "weight": 0.5, "head": {"kind": "mlp_v2", "upsample": 2},
                   "normaliser": {"kind": "channel", "steps": 100, "every": 2}},
        "token": network | {"summary": "class_token", "objective": {"kind": None, "summary": "cosine"}},
    }
    return {name: value for name, value in MIM.items() if name != "teacher"} | {
        "teachers": teachers, "objective": {"kind": "cosine_smooth_l1", "visible": 0.25},
        "student": MIM["student"] | {"class_tokens": "per_teacher", "registers": 3, "head": "mlp"},
    }


def test_all_of_it_on_one_process_and_on_two_with_a_kill_before_and_after_the_statistics_are_fixed(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, three(tmp_path))
    run("mim", recipe, tmp_path / "one")
    found = records(tmp_path / "one")
    names = {"loss_vit", "loss_vit_summary", "loss_pixels", "loss_pixels_visible", "loss_token_summary"}
    assert names == {name for name in found[0] if name.startswith("loss_")}
    for record in found:
        parts = [record["loss_vit"], 0.3 * record["loss_vit_summary"], 0.5 * record["loss_pixels"],
                 0.125 * record["loss_pixels_visible"], record["loss_token_summary"]]
        assert record["loss"] == pytest.approx(sum(parts), abs=1e-5)
        assert sum(record[f"share_{name.removeprefix('loss_')}"] for name in names) == pytest.approx(1.0, abs=1e-5)
    assert found[-1]["loss"] < 0.8 * found[0]["loss"]
    assert found[0]["loss_vit"] == pytest.approx(1.0, abs=0.1)  # of normalised features: a head that says nothing has error 1

    more = "run.engine=deepspeed", "run.micro_batch=6"
    run("mim", recipe, tmp_path / "two", *more, "run.zero_stage=1", processes=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=ROUNDING)
    again = finish(python("eva_mim.cli", "evaluate", tmp_path / "one")).stdout.splitlines()[1:]
    assert len(again) > 10
    assert all(line.endswith("equal") for line in again), again  # normalisers are read from the checkpoint

    for step in (2, 5):
        out = tmp_path / f"killed{step}"
        run_until(step, "mim", recipe, out)
        run("mim", recipe, out)
        for name in ("model.safetensors", "head.safetensors"):
            same_weights(out / name, tmp_path / "one" / name)
        assert losses(out) == losses(tmp_path / "one")


@torch.no_grad()
def test_exported_heads_say_what_the_teachers_say_to_plain_torch_and_timm(tmp_path: Path) -> None:
    """Held-out figures by hand from the folder: normalisers are in the last layers."""
    tree = three(tmp_path)
    tree |= {"mask": {"ratio": 0.0}, "run": MIM["run"] | {"epochs": 1}}
    tree["objective"] = {"kind": "cosine_smooth_l1"}
    recipe = write_recipe(tmp_path, tree)
    out = tmp_path / "run"
    run("mim", recipe, out)
    figures = records(out, "eval")[-1]
    trunk = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=0).eval()
    heads = load_file(out / "head.safetensors")
    teacher = timm.create_model("vit_nano_patch4_32", num_classes=0, img_size=16).eval()
    teacher.load_state_dict(load_file(tmp_path / "teacher.safetensors"))
    students, teachers = held_out(32), held_out(16)
    tokens = trunk.forward_features(students)
    assert trunk.num_prefix_tokens == 4

    def mlp(rows: Tensor, name: str) -> Tensor:
        hidden = F.linear(rows, heads[f"{name}.0.weight"], heads[f"{name}.0.bias"])
        hidden = F.gelu(F.layer_norm(hidden, hidden.shape[-1:], heads[f"{name}.1.weight"], heads[f"{name}.1.bias"]))
        return F.linear(hidden, heads[f"{name}.3.weight"], heads[f"{name}.3.bias"])

    wanted = teacher.forward_features(teachers)
    said = mlp(tokens[:, 4:], "head.vit")
    assert F.cosine_similarity(said, wanted[:, 1:], dim=-1).mean().item() == pytest.approx(figures["cosine_vit"], abs=1e-5)
    spread = (wanted[:, 1:] - wanted[:, 1:].mean((0, 1))).square().sum()
    error = (said - wanted[:, 1:]).square().sum() / spread
    assert error.item() == pytest.approx(figures["error_vit"], abs=1e-4)
    for name, place, summary in (("vit", 0, teacher.forward_head(wanted)), ("token", 1, wanted[:, 0])):
        cosine = F.cosine_similarity(mlp(tokens[:, place], f"summary_head.{name}"), summary, dim=-1).mean()
        assert cosine.item() == pytest.approx(figures[f"summary_cosine_{name}"], abs=1e-5)

    # Pixels: the head says 2 x 2 cells of 4 px for each patch of 8 px.
    rows = F.linear(tokens[:, 4:], heads["head.pixels.first.weight"], heads["head.pixels.first.bias"])

    def block(x: Tensor, name: str) -> Tensor:
        x = F.gelu(F.layer_norm(x, x.shape[-1:], heads[f"{name}.0.weight"], heads[f"{name}.0.bias"]))
        return F.linear(x, heads[f"{name}.2.weight"], heads[f"{name}.2.bias"])

    said = block(rows + block(rows, "head.pixels.blocks.0"), "head.pixels.last").unflatten(-1, (2, 2, 48))
    cells = pixels_of(held_out_bytes(32))
    assert F.cosine_similarity(said, cells, dim=-1).mean().item() == pytest.approx(figures["cosine_pixels"], abs=1e-5)


def held_out_bytes(side: int, **scenes: Any) -> Tensor:
    """[B, 3, side, side] held-out images, from 0 to 1; those of the tiny recipes, or of other scenes."""
    source, view = SceneSource(SceneSettings(**(scenes or MIM["data"]["scenes"])), "val"), EvalView([side])
    return torch.stack([view(source.read(index).image, random.Random(0))[side] for index in range(len(source))]).float() / 255


def held_out(side: int, **scenes: Any) -> Tensor:
    """The same, normalised as the small ViTs have it."""
    mean, std = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    return (held_out_bytes(side, **scenes) - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def pixels_of(images: Tensor) -> Tensor:
    """[B, 16, 2, 2, 48]: the cells of 4 px of each patch of 8 px, each with mean 0 and deviation 1 over its numbers (MAE)."""
    images = (images - torch.tensor(IMAGENET_DEFAULT_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_DEFAULT_STD).view(3, 1, 1)
    cells = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).flatten(3)  # [B, 8, 8, 48]
    cells = (cells - cells.mean(-1, keepdim=True)) / (cells.var(-1, keepdim=True) + 1e-6).sqrt()
    return cells.view(-1, 4, 2, 4, 2, 48).transpose(2, 3).reshape(-1, 16, 2, 2, 48)


def test_a_summary_of_a_teacher_without_one_is_refused(tmp_path: Path) -> None:
    tree = three(tmp_path)
    sam = {"kind": "timm", "name": "samvit_base_patch16", "image_size": 64, "objective": {"kind": "mse", "summary": "cosine"}}
    tree["teachers"] = {"sam": sam}
    done = finish(python("pretrain.mim", write_recipe(tmp_path, tree), "--out", tmp_path / "run"), 2)
    assert "teachers.sam (samvit_base_patch16) has no summary; give it losses of its own" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_dump_has_the_statistics_and_is_replayed_with_them(tmp_path: Path) -> None:
    tree = three(tmp_path)
    tree["run"] = MIM["run"] | {"max_skips": 1}
    tree["groups"] = {"near": {"teachers": ["vit", "pixels"], "batch": 16}, "far": {"teachers": ["token", "vit"], "batch": 8}}
    recipe = write_recipe(tmp_path, tree)
    finish(python("tests.poison", "all", "mim", recipe, "--out", tmp_path / "run"), 3)
    run("mim", recipe, tmp_path / "healthy", "run.epochs=1")
    dump = next((tmp_path / "run" / "dumps").iterdir())
    said = finish(python("tests.poison", "none", "replay", dump), 1).stdout
    found = [float(line.split("loss ")[1].split(",")[0]) for line in said.splitlines() if line.startswith("  rank ")]
    first = records(tmp_path / "healthy")[0]
    near = first["loss_pixels"] * 0.5 + first["loss_pixels_visible"] * 0.125
    assert len(found) == 2
    assert found[0] - near + found[1] - first["loss_token_summary"] == pytest.approx(
        2 * (first["loss_vit"] + 0.3 * first["loss_vit_summary"]), rel=0.2)  # means of two parts of the patches
    assert found[0] > near


def heads_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "head.safetensors")


def test_heads_are_trained_alone_at_first_and_start_from_another_run(tmp_path: Path) -> None:
    tree = three(tmp_path)
    tree["optim"] = {"lr": 2e-3, "warmup_steps": 0, "heads": {"alone": 4, "lr": 4e-3}, "layer_decay": 0.8}
    recipe = write_recipe(tmp_path, tree)
    run("mim", recipe, tmp_path / "alone", "run.epochs=1")  # 4 steps
    untrained = tmp_path / "untrained"
    run("mim", recipe, untrained, "run.epochs=1", "optim.lr=1e-30", "optim.heads.lr=null")
    same_weights(tmp_path / "alone" / "model.safetensors", untrained / "model.safetensors")
    moved = [float((value - heads_of(untrained)[name]).abs().max()) for name, value in heads_of(tmp_path / "alone").items()
             if name.startswith(("head.", "summary_head."))]
    assert min(moved) > 1e-5
    assert records(tmp_path / "alone")[-1]["loss"] < 0.9 * records(tmp_path / "alone")[0]["loss"]

    run("mim", recipe, tmp_path / "both")
    assert (tmp_path / "both" / "model.safetensors").read_bytes() != (untrained / "model.safetensors").read_bytes()
    more = "run.engine=deepspeed", "run.micro_batch=6"
    run("mim", recipe, tmp_path / "two", *more, "run.zero_stage=2", processes=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "both"), abs=ROUNDING)
    run_until(5, "mim", recipe, tmp_path / "killed")
    run("mim", recipe, tmp_path / "killed")
    same_weights(tmp_path / "killed" / "model.safetensors", tmp_path / "both" / "model.safetensors")

    # The next stage: heads begin where they ended, although their targets are normalised by new statistics.
    start = f"init_from={tmp_path / 'both'}", f"init_heads={tmp_path / 'both'}"
    done = run("mim", recipe, tmp_path / "next", *start, "optim.lr=1e-30", "optim.heads.lr=null", "run.epochs=1")
    assert f"heads of vit, pixels, token from {tmp_path / 'both'}" in done.stderr
    before, after = (records(tmp_path / name, "eval")[-1] for name in ("both", "next"))
    for figure in ("cosine_vit", "cosine_pixels", "error_vit", "summary_cosine_vit", "summary_cosine_token"):
        assert after[figure] == pytest.approx(before[figure], abs=0.01), figure  # the mask token starts anew


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["student.head.width=7"], "its heads for vit are of another kind or size: head.vit.0.bias"),
        (["teachers.vit.weights=null"], "its heads for vit were trained for other weights of that teacher"),
    ],
)
def test_heads_that_do_not_fit_are_refused(tmp_path: Path, overrides: list[str], said: str) -> None:
    tree = three(tmp_path)
    del tree["teachers"]["pixels"], tree["teachers"]["token"]
    tree["student"] = MIM["student"] | {"head": {"kind": "mlp"}}
    recipe = write_recipe(tmp_path, tree)
    run("mim", recipe, tmp_path / "first", "run.epochs=1")
    start = f"init_heads={tmp_path / 'first'}"
    done = run("mim", recipe, tmp_path / "second", start, *overrides, code=2)
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@torch.no_grad()
def test_zero_shot_through_a_clip_teachers_head_is_that_of_plain_torch(tmp_path: Path) -> None:
    run("clip", write_recipe(tmp_path, CLIP, "clip.yaml"), tmp_path / "clip", "run.epochs=1")
    teachers = {"clip": {"kind": "stage", "name": str(tmp_path / "clip"), "objective": {"kind": None, "summary": "cosine"}}}
    tree = {name: value for name, value in MIM.items() if name != "teacher"} | {
        "teachers": teachers, "mask": {"ratio": 0.0}, "data": CLIP["data"],
        "evaluate": MIM["evaluate"] | {"zeroshot": "clip"},
    }
    out = tmp_path / "run"
    done = run("mim", write_recipe(tmp_path, tree), out)
    figures = records(out, "eval")[-1]
    assert figures["summary_cosine"] > 0.3
    heads, (name, vectors) = heads_of(out), load_file(out / "zeroshot.safetensors").popitem()
    trunk = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=0).eval()
    said = F.linear(trunk.forward_features(held_out(32))[:, 0], heads["summary_head.clip.weight"],
                    heads["summary_head.clip.bias"])
    assert name == "clip"
    plain = runpy.run_path(str(REPOSITORY / "docs" / "examples" / "heads_in_plain_torch.py"))
    assert (plain["zeroshot"](out, held_out_bytes(32), "clip") - F.normalize(said, dim=-1) @ vectors.T).abs().max() < 1e-5
    scenes = SceneSource(SceneSettings(**MIM["data"]["scenes"]), "val")
    labels = torch.tensor([scenes.read(index).label for index in range(len(scenes))])
    top1 = 100 * ((said @ vectors.T).argmax(1) == labels).float().mean().item()
    assert figures["zeroshot_top1"] == pytest.approx(top1, abs=1e-4)

    # The vectors are those of open_clip's own tower.
    model, tokenize = open_clip.create_model(f"local-dir:{tmp_path / 'clip'}"), open_clip.get_tokenizer(
        f"local-dir:{tmp_path / 'clip'}")
    classes = json.loads((out / "lineage.json").read_text())["classes"]
    wanted = model.eval().encode_text(tokenize([f"a {spoken(name)}" for name in classes]), normalize=True)
    assert (vectors - wanted).abs().max() < 1e-5
    assert "zeroshot_top1" in done.stderr


def test_zero_shot_asks_for_a_summary_and_a_text_tower(tmp_path: Path) -> None:
    tree = three(tmp_path)
    for name, said in (("pixels", "its summary is not learned"), ("sam", "is no teacher; known: vit, pixels, token"),
                       ("token", "teachers.token.kind=timm has no text tower")):
        recipe = write_recipe(tmp_path, tree | {"evaluate": MIM["evaluate"] | {"zeroshot": name}})
        assert said in run("mim", recipe, tmp_path / "run", code=2).stderr
