"""Tiny whole checkpoints of every kind, and a run of `eva-mim convert` that has to keep what is promised of it."""

from __future__ import annotations

import io
import json
import os
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch import Tensor

from eva_mim.commands.convert import main
from eva_mim.weights.names.buffers import Rope
from eva_mim.weights.names.eva import to_eva

SECONDS, MEMORY = 60, 2 * 2**30  # tells what ends from what does not, on slow machines too
VIT: dict[str, Any] = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2, "mlp_ratio": 2.0}
EVA02: dict[str, Any] = VIT | {"ref_feat_shape": 2, "num_classes": 0}
CLIP_SIZES: dict[str, Any] = {
    "embed_dim": 8, "quick_gelu": True,
    "vision_cfg": {"image_size": 8, "patch_size": 4, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 6, "vocab_size": 20, "width": 8, "heads": 2, "layers": 1},
}
PIXELS = {"input_size": [3, 8, 8], "mean": [0.5] * 3, "std": [0.5] * 3}


def contents(folder: Path) -> dict[str, Any]:
    """Every path, with what it holds."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found[str(path)] = (
            os.readlink(path) if path.is_symlink()
            else path.read_bytes() if path.is_file() and status.st_size < 10_000_000
            else (status.st_mode, status.st_size, status.st_mtime_ns) if path.is_file() else status.st_mode
        )
    return found


def resident(which: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which))


def ends(home: Path, source: Path, *options: str, to: str = "timm", dst: Path | None = None) -> tuple[int, str]:
    """(exit code, what was said) of one run that kept all promises."""
    dst = dst or home / "out" / {"eva": "result.pt", "timm": "result.safetensors"}.get(to, "result")
    before, said = contents(home), io.StringIO()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    at_first, started = resident("VmRSS"), time.process_time()
    with redirect_stderr(said), redirect_stdout(said):
        code = main(["--to", to, *options, "--", str(source), str(dst)])
    assert time.process_time() - started < SECONDS
    assert resident("VmHWM") - at_first < MEMORY
    after, text = contents(home), said.getvalue()
    if code:
        assert (code, text[:7]) == (2, "error: ")
        assert {path: kind for path, kind in after.items() if before.get(path) != kind} == {}
        assert after.keys() == before.keys()
    else:
        mine = (str(dst), f"{dst}.convert.json")
        assert all(after.get(path) == kind for path, kind in before.items() if not path.startswith(mine))
        assert all(path in before or path in mine or path.startswith(f"{dst}/") for path in after)
    return code, text


def refused(home: Path, source: Path, match: str, *options: str, **more: Any) -> None:
    code, text = ends(home, source, *options, **more)
    assert code == 2, text
    assert match in text
    assert len(text) < 3000


def clean(home: Path) -> None:
    for path in sorted((home / "out").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def random_state(name: str, **arguments: Any) -> dict[str, Tensor]:
    return {key: torch.randn_like(value) for key, value in timm.create_model(name, **arguments).state_dict().items()}


def keywords(architecture: str, arguments: dict[str, Any]) -> list[str]:
    given = [f"--argument={key}={value}" for key, value in arguments.items() if key != "num_classes"]
    return [f"--architecture={architecture}", *given]


def timm_folder(folder: Path, weights: dict[str, Tensor] | None = None, **changes: Any) -> Path:
    folder.mkdir()
    save_file(weights or random_state("vit_tiny_patch16_224", num_classes=3, **VIT), folder / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 3, "model_args": VIT, "pretrained_cfg": PIXELS} | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def clip_folder(folder: Path, sizes: dict[str, Any] = CLIP_SIZES, weights: dict[str, Tensor] | None = None) -> Path:
    folder.mkdir()
    state = weights or {key: torch.randn_like(value) for key, value in CLIP(**CLIP_SIZES).state_dict().items()}
    save_file(state | {"logit_scale": torch.tensor(1.0)}, folder / "open_clip_model.safetensors")
    pixels = {"size": 8, "mean": [0.5] * 3, "std": [0.5] * 3}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": sizes, "preprocess_cfg": pixels}))
    return folder


def hub_folder(folder: Path, **changes: Any) -> Path:
    transformers = pytest.importorskip("transformers")
    settings = transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                                      image_size=8, patch_size=4, num_labels=3, layer_norm_eps=1e-6)
    transformers.ViTForImageClassification(settings).save_pretrained(folder)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    return folder


def original() -> dict[str, Tensor]:
    """EVA-02 under the original names, with rotary tables."""
    state = random_state("eva02_base_patch14_224", **EVA02)
    return {key: value.clone() for key, value in to_eva(state, grid=(2, 2), rope=Rope(4, 2)).weights.items()}


def example(kind: str, folder: Path) -> tuple[Path, list[str], str]:
    """(a whole checkpoint, options, target)."""
    if kind == "safetensors":
        save_file(random_state("vit_tiny_patch16_224", num_classes=3, **VIT), folder / "a.safetensors")
        return folder / "a.safetensors", keywords("vit_tiny_patch16_224", VIT), "hf"
    if kind == "zip":
        torch.save({"module": original(), "epoch": 3}, folder / "a.pt")
        return folder / "a.pt", keywords("eva02_base_patch14_224", EVA02), "timm"
    if kind == "timm":
        return timm_folder(folder / "a"), [], "safetensors"
    if kind == "open_clip":
        return clip_folder(folder / "a"), [], "hf"
    return hub_folder(folder / "a"), keywords("vit_tiny_patch16_224", VIT), "timm"
