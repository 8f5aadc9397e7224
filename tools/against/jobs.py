"""The jobs: data, settings and command lines of both sides of a comparison."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from eva_mim.core.errors import UserError
from eva_mim.core.log import say
from tools.against.original import GRID, STUDENTS
from tools.against.pictures import write_folders, write_shards
from tools.against.runs import WARM_UP, Job, Side, start

AHEAD = 4
"""Batches that each loader process of this project reads ahead; the others have 2, torch's default."""
LR, BETAS, EPS, WEIGHT_DECAY, CLIP_GRAD = 1e-4, (0.9, 0.98), 1e-6, 0.05, 3.0
"""Of AdamW on all sides. The time of a step does not depend on them."""
CLIP_CROP, CROP, FLIP, SMOOTHING, DROP_PATH, MASKED = (0.9, 1.0), (0.2, 1.0), 0.5, 0.1, 0.1, 0.41
"""Share of a picture in random crops (open_clip's, EVA's), probability of a flip, label smoothing, stochastic depth of the last
block, and share of masked patches."""


def clip(options: argparse.Namespace, work: Path) -> Job:
    """Returns `eva-mim clip` and open_clip_train with a model of open_clip. Raises UserError for missing packages, for an unknown
    model, and for one whose image tower timm does not have."""
    if missing := [name for name in ("open_clip_train", "webdataset", "braceexpand", "pandas") if find_spec(name) is None]:
        raise UserError(f"open_clip_train needs {', '.join(missing)}, which are not installed: pip install "
                        "'open_clip_torch[training]'")
    student, shards, count = _clip_student(options.model), max(1, options.workers), _pictures(options)
    write_shards(work / "data", count, shards)
    data = {"source": "shards", "train": "train-*.tar", "val": "val-*.tar"}
    recipe = _recipe(work, options, data, student=student, view={"crop_scale": CLIP_CROP, "flip": 0.0})
    theirs = _words({
        "train-data": f"{work}/data/train-{{0..{shards - 1}}}.tar", "train-num-samples": count, "dataset-type": "webdataset",
        "model": options.model, "batch-size": options.batch, "workers": options.workers, "epochs": 1, "device": "cpu",
        "precision": {"bf16": "amp_bf16", "fp32": "fp32"}[options.precision], "lr": LR, "beta1": BETAS[0], "beta2": BETAS[1],
        "eps": EPS, "wd": WEIGHT_DECAY, "grad-clip-norm": CLIP_GRAD, "warmup": 0, "aug-cfg": f"scale={CLIP_CROP}", "logs": "logs",
    })
    ours = Side("eva-mim", ["eva_mim.cli", "clip", recipe, "--out", "run"])
    return Job(f"clip {options.model}", [ours], Side("open_clip_train", ["open_clip_train.main", *theirs]))


def classify(options: argparse.Namespace, work: Path) -> Job:
    """Returns `eva-mim classify` and timm's train.py with a model of timm. Raises UserError if there is no train.py."""
    train = options.timm / "train.py" if options.timm.is_dir() else options.timm
    if not train.is_file():
        raise UserError(f"--timm: {train} is not there; it is a file of huggingface/pytorch-image-models, not of timm's package")
    classes = write_folders(work / "data", _pictures(options))
    data = {"source": "folder", "train": "train", "val": "val"}
    recipe = _recipe(work, options, data, student={"name": options.model, "global_pool": "avg"}, mix={"smoothing": SMOOTHING},
                     view={"crop_scale": CROP, "flip": FLIP})
    theirs = _words({
        "data-dir": work / "data", "val-split": "val", "model": options.model, "num-classes": classes, "gp": "avg",
        "batch-size": options.batch, "workers": options.workers, "epochs": 1, "warmup-epochs": 0, "device": "cpu",
        "opt": "adamw", "lr": LR, "opt-betas": BETAS, "opt-eps": EPS, "weight-decay": WEIGHT_DECAY, "clip-grad": CLIP_GRAD,
        "smoothing": SMOOTHING, "scale": CROP, "hflip": FLIP, "color-jitter": 0, "train-interpolation": "bicubic",
        "output": "out",
    } | ({"amp": (), "amp-dtype": "bfloat16"} if options.precision == "bf16" else {}))
    ours = Side("eva-mim", ["eva_mim.cli", "classify", recipe, "--out", "run"])
    attention = {"TIMM_FUSED_ATTN": os.environ.get("TIMM_FUSED_ATTN", "0")}
    return Job(f"classify {options.model}", [ours], Side("timm's train.py", [str(train.resolve()), *theirs], attention))


def mim(options: argparse.Namespace, work: Path) -> Job:
    """Returns `eva-mim mim`, live and from a cache, and the original pre-training. Raises UserError if that is not there, and if
    the cache cannot be made."""
    if not (options.original / "run_eva_pretraining.py").is_file():
        raise UserError(f"--original: {options.original} has no run_eva_pretraining.py; give EVA-01/eva of baaivision/EVA")
    write_folders(work / "data", _pictures(options))
    student, store = STUDENTS[options.student], work / "cache"
    recipe = _recipe(
        work, options, {"source": "folder", "train": "train", "val": "val"},
        teacher={"kind": "open_clip", "name": "ViT-L-14-quickgelu"}, objective={"kind": "cosine"},
        student={"name": student.timm, "image_size": 224, "patch_size": 14, "drop_path": DROP_PATH},
        mask={"kind": "block", "ratio": MASKED, "min_block": 16}, view={"seed": 0, "crop_scale": CROP, "flip": FLIP},
    )
    say("making a cache of targets")
    cache = ["eva_mim.cli", "cache", recipe, "--program", "mim", "--views", "1", "--out", str(store), "--dtype", "int8"]
    start(Side("eva-mim cache", cache), work, work)
    live = Side("eva-mim, live", ["eva_mim.cli", "mim", recipe, "--out", "run"])
    cached = Side("eva-mim, cached", [*live.program, f"targets.cached={store}"])
    theirs = _words({
        "data_path": work / "data/train", "val_data_path": work / "data", "batch_size": options.batch, "epochs": 1,
        "num_workers": options.workers, "warmup_epochs": 0, "device": "cpu", "lr": LR, "opt_betas": BETAS, "opt_eps": EPS,
        "weight_decay": WEIGHT_DECAY, "clip_grad": CLIP_GRAD, "drop_path": DROP_PATH, "crop_scale": CROP,
        "num_mask_patches": round(MASKED * GRID**2), "min_mask_patches_per_block": 16,
    })
    targets = "given" if options.no_teacher else "live"
    program = ["tools.against.original", str(options.original.resolve()), options.student, options.precision, targets, *theirs]
    title = f"mim {options.student}, {'targets given' if options.no_teacher else 'CLIP L/14'}"
    return Job(title, [cached] if options.no_teacher else [live, cached], Side("original EVA-01", program))


def _pictures(options: argparse.Namespace) -> int:
    """Returns how many pictures a run has: it ends in its first epoch, with its loader processes still at work."""
    count: int = options.batch * (WARM_UP + options.steps + AHEAD * options.workers + 1)
    return count


def _recipe(work: Path, options: argparse.Namespace, data: Mapping[str, Any], **parts: Mapping[str, Any]) -> str:
    """Writes the recipe of our side; returns its path."""
    tree = {
        "data": {**data, "root": f"{work}/data", "workers": options.workers}, **parts,
        "run": {"epochs": 1, "global_batch": options.batch, "precision": options.precision, "device": "cpu"},
        "optim": {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY, "clip_grad": CLIP_GRAD, "warmup_steps": 0},
    }
    (work / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return f"{work}/recipe.yaml"


def _words(flags: Mapping[str, object]) -> list[str]:
    """Returns a command line: of each flag its name, and its value or values."""
    return [word for name, value in flags.items()
            for word in (f"--{name}", *map(str, value if isinstance(value, tuple) else (value,)))]


def _clip_student(name: str) -> dict[str, Any]:
    """Returns the student's settings for a model of open_clip. Its own transformers are looked up among timm's."""
    import open_clip
    import timm

    from eva_mim.trunks.meta import meta_device

    config = open_clip.get_model_config(name)
    if config is None:
        raise UserError(f"--model: open_clip has no {name!r}")
    vision, kind = config["vision_cfg"], "quickgelu_" if config.get("quick_gelu") else ""
    settings = {"embed_dim": config["embed_dim"], "text": {"init_from": name}}
    if tower := vision.get("timm_model_name"):
        return settings | {"name": tower, "pool": vision.get("timm_pool", "avg")}
    for tower in timm.list_models(f"vit_*_patch{vision.get('patch_size')}_clip_{kind}{vision['image_size']}"):
        with meta_device():
            found = timm.create_model(tower)
        if (found.embed_dim, len(found.blocks)) == (vision["width"], vision["layers"]):
            return settings | {"name": tower, "pool": "token"}
    raise UserError(f"--model: timm has no image tower of the sizes of {name}")
