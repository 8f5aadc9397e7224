"""The published chains with everything but size and data: widths of 48, two blocks, drawn scenes, two steps a stage.

Architectures, image and patch sizes, masks, heads, hand-overs, laws of initial values, optimizers and augmentation are those of
the recipes.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import timm
from timm.models import register_model
from timm.models.vitamin import VitCfg, VitConvCfg

from eva_mim import cli
from eva_mim.core.recipe_files import read_yaml
from eva_mim.pipeline.plan import PipelineFile
from tests.tiny import write_recipe

SMALL: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 2}
CONVOLUTIONS = VitCfg(embed_dim=(8, 16, 48), depths=(1, 1, 1), stem_width=8, head_type="1d",
                      conv_cfg=VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6))  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {"eva": SMALL, "vit_": SMALL, "vitamin": SMALL | {"embed_cfg": CONVOLUTIONS}}
"""Arguments of an architecture by the beginning of its name."""
SCENES = {"source": "scenes", "workers": 0}
DRAWN = {"size": 64, "train": 16, "val": 8}
RUN = {"epochs": 1, "samples": None, "global_batch": 8, "micro_batch": None, "engine": "local", "zero_stage": 0,
       "precision": "fp32", "device": "cpu", "log_every": 1, "evaluate_every": 1, "evaluate_steps": None,
       "checkpoint_every": None}
TEXT = {"width": 32, "layers": 2, "heads": 2, "context_length": 12}
TEACHER = {"kind": "timm", "name": "vit_nano_patch4_32"}


def nano(name: str) -> str:
    """Registers the small network of an architecture with timm; returns its name."""
    entry = timm.models.model_entrypoint(name)
    small = next(sizes for start, sizes in SIZES.items() if name.startswith(start))

    def build(pretrained: bool = False, **options: Any) -> Any:
        return entry(pretrained=False, **small | options)

    build.__name__, build.__module__ = f"nano_{name}", __name__
    if not timm.is_model(build.__name__):
        register_model(build)
    return build.__name__


def shrunk(tree: dict[str, Any], labels: str, own_teacher: bool) -> dict[str, Any]:
    """A published recipe's tree, small; without `own_teacher` an earlier stage is its teacher."""
    tree = tree | {"run": tree["run"] | RUN}
    templates = {"templates": ["a {}"]} if "templates" in tree["data"] else {}
    tree["data"] = SCENES | templates | {"scenes": DRAWN | {"labels": labels}}
    student = tree["student"] = tree["student"] | {"name": nano(tree["student"]["name"])}
    if "text" in student:
        student["text"] = TEXT | {name: value for name, value in student["text"].items() if name == "quick_gelu"}
        student["embed_dim"] = 32
    if "decoder" in student:
        student["decoder"] = {"width": 32, "depth": 1, "heads": 2}
    if "teacher" in tree:
        patch, size = re.findall(r"(?:patch(\d+))?_(\d+)", student["name"])[-1]
        grid = student.get("image_size", int(size)) // int(patch or 16)  # ViTamin's cells
        tree["teacher"] = TEACHER | {"image_size": 4 * grid} if own_teacher else {}
        tree["evaluate"] = {"images": 8, "bank": 8}
    tree["optim"] = {name: value for name, value in tree["optim"].items() if name != "warmup_steps"} | {"warmup_epochs": 0}
    return tree


def shrink(pipeline: str, folder: Path) -> Path:
    """A published pipeline of small recipes, as a file."""
    file = PipelineFile.model_validate(read_yaml(f"configs/pipelines/{pipeline}.yaml"))
    stages = []
    for stage in file.stages:
        tree = shrunk(read_yaml(stage.recipe), "fine" if stage.name == "in21k" else "coarse", stage.teacher is None)
        entry = stage.model_dump(exclude_defaults=True) | {"recipe": str(write_recipe(folder, tree, f"{stage.name}.yaml"))}
        if tree["student"].get("lock_text"):  # the released tower of the recipe is not at hand
            entry["text_from"] = next(one["name"] for one in stages if one["program"] == "clip")
        stages.append(entry)
    return write_recipe(folder, {"stages": stages, "compare": file.compare}, "pipeline.yaml")


def run_small(pipeline: str, folder: Path) -> None:
    """Runs a published pipeline, small, to its end; for a process of `tests/ranks.py`."""
    sys.exit(cli.main(["pipeline", str(shrink(pipeline, folder)), "--out", str(folder / "out")]))
