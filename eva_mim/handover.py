"""Between stages: what a finished stage left, and the seeding of a new trunk with it, accounted for key by key."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from eva_mim.config import UserError
from eva_mim.contracts import Grid
from eva_mim.convert.report import KeyReport
from eva_mim.files import sha256

WEIGHTS, LINEAGE = "model.safetensors", "lineage.json"


@dataclass(frozen=True)
class Parent:
    """Weights of an earlier stage under timm's names, and its record (empty for a bare file)."""

    path: Path
    weights: dict[str, Tensor]
    record: dict[str, Any]

    @property
    def grid(self) -> Grid | None:
        """Patch grid of the parent's position table."""
        grid = self.record.get("grid")
        return (grid[0], grid[1]) if grid else None


def weights_file(path: str | Path) -> Path:
    """The weight file of a stage folder, or the file itself. Raises UserError."""
    path = Path(path)
    file = path / WEIGHTS if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"init_from: {file} does not exist; it must be the folder of a finished stage or a .safetensors file")
    return file


def content_hash(path: Path) -> str:
    """SHA-256 of what a parent setting points to: a stage's weights, or a file. Raises UserError."""
    return sha256(weights_file(path))


def read_record(folder: Path) -> dict[str, Any]:
    """A stage's lineage record; empty when there is none."""
    file = folder / LINEAGE
    try:
        record: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}") from None
    return record


def read_parent(path: str | Path) -> Parent:
    """Weights and record. Raises UserError for a missing or unreadable file."""
    file = weights_file(path)
    try:
        weights = load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"init_from: {file} is not a readable safetensors file: {error}") from None
    return Parent(file, weights, read_record(file.parent) if file.name == WEIGHTS else {})


def seed_trunk(
    trunk: nn.Module, parent: Parent, classes: tuple[str, ...] | None = None, *, fresh_norm: bool = False
) -> KeyReport:
    """Copy a parent's weights into a timm model, in place.

    Positions are resized to the trunk's grid (timm's antialiased bicubic), a patch kernel by timm's function-preserving
    rule. A mean-pooled trunk's `fc_norm` starts as the parent's `norm` (timm's rule; with `fresh_norm` it is left as it was
    made, EVA's rule), and back. The head is kept when `classes` equals the parent's class list and is new otherwise. Raises
    UserError when any other tensor is missing, left over or of another shape: that is another architecture.
    """
    report = KeyReport()
    state = trunk.state_dict()
    head = _head_prefix(trunk)
    given = dict(parent.weights)
    for here, there in (("fc_norm", "norm"), ("norm", "fc_norm")):
        if here == "fc_norm" and fresh_norm:
            continue
        if f"{here}.weight" in state and f"{here}.weight" not in given:
            for leaf in ("weight", "bias"):
                if f"{there}.{leaf}" in given:
                    given[f"{here}.{leaf}"] = given.pop(f"{there}.{leaf}")
    same_classes = classes is not None and list(classes) == parent.record.get("classes")
    wrong = []
    for name, value in state.items():
        is_head = head is not None and name.startswith(head)
        is_fresh = fresh_norm and name.startswith("fc_norm.") and name not in given
        if is_fresh or (is_head and not (same_classes and name in given)):
            report.new.append(name)
        elif name not in given:
            wrong.append(f"{name}: not in the checkpoint")
        elif given[name].shape == value.shape:
            state[name] = given[name].to(value.dtype)
            report.loaded.append(name)
        elif (resized := _resize(name, given[name], value, trunk, parent.grid)) is not None:
            state[name] = resized.to(value.dtype)
            report.resized.append(name)
        else:
            wrong.append(f"{name}: {list(given[name].shape)} in the checkpoint, {list(value.shape)} here")
    for name in given.keys() - state.keys():
        if name.startswith(("head", "fc.", "classifier", "fc_norm.", "norm.")) or (head and name.startswith(head)):
            report.ignored.append(name)
        else:
            wrong.append(f"{name}: {list(given[name].shape)} in the checkpoint, not here")
    report.ignored += sorted(set(report.new) & given.keys())
    if wrong:
        more = f"\n  ... and {len(wrong) - 12} more" if len(wrong) > 12 else ""
        raise UserError(
            f"init_from: {parent.path} is of another architecture:\n  " + "\n  ".join(sorted(wrong)[:12]) + more
        )
    trunk.load_state_dict(state)
    _prove(trunk, given, report.loaded)
    return report


def _prove(trunk: nn.Module, given: dict[str, Tensor], loaded: list[str]) -> None:
    """What the report calls loaded is in the trunk, bit for bit."""
    state = trunk.state_dict()
    unequal = [name for name in loaded if not torch.equal(state[name].cpu(), given[name].to(state[name].dtype))]
    assert not unequal, unequal


def _head_prefix(trunk: nn.Module) -> str | None:
    head: nn.Module = trunk.get_classifier()  # type: ignore[operator]
    return next((f"{name}." for name, module in trunk.named_modules() if module is head and name), None)


def _resize(name: str, value: Tensor, wanted: Tensor, trunk: Any, grid: Grid | None) -> Tensor | None:
    from timm.layers import resample_abs_pos_embed, resample_patch_embed

    resized: Tensor | None = None
    if name == "pos_embed" and value.shape[-1] == wanted.shape[-1]:
        prefix = 0 if getattr(trunk, "no_embed_class", False) else trunk.num_prefix_tokens
        resized = resample_abs_pos_embed(
            value,
            new_size=list(trunk.patch_embed.grid_size),
            old_size=list(grid) if grid else None,
            num_prefix_tokens=prefix,
        )
    elif name == "patch_embed.proj.weight" and value.shape[:2] == wanted.shape[:2]:
        resized = resample_patch_embed(value, list(wanted.shape[-2:]))
    return resized
