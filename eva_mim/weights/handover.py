"""Hand-over between stages: reading a finished stage, and seeding a new trunk with its weights, with a report of every tensor."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from eva_mim.core.contracts import Grid
from eva_mim.core.errors import UserError
from eva_mim.core.report import KeyReport
from eva_mim.core.run_folder import RunFolder
from eva_mim.trunks import facts
from eva_mim.weights import HandOverSettings
from eva_mim.weights.files.lazy import Deferred, finite, materialise
from eva_mim.weights.hints import Pixels, read_hints
from eva_mim.weights.names.eva import unshare_relative, with_norm
from eva_mim.weights.names.translate import NamedCheckpoint, read_source
from eva_mim.weights.resize import adapt_kernel, resize_trunk

__all__ = ["Match", "Parent", "match", "parent_of", "planned_parent", "read_parent", "seed_trunk"]
INNER_NORM = ".attn.norm."
"""Norm inside attention, which EVA-02's CLIP towers have and its masked students lack (facts on EVA-CLIP, section 4); it
starts fresh."""


SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"
PARTS_OF_A_HEAD = ("head", "fc.", "classifier", "fc_norm.", "norm.")
"""Prefixes of a parent's tensors that may stay unused: its own head, and the norm in front of the head."""


@dataclass(frozen=True)
class Parent:
    """A trunk of an earlier stage, or of a foreign checkpoint, under timm's names."""

    path: Path
    weights: Mapping[str, Tensor]
    classes: tuple[str, ...] | None
    """Classes of its head, in the order of the rows; None if unknown."""
    grid: Grid | None
    """Patch grid of its positions; None if unknown."""
    ignored: KeyReport
    """Report of the checkpoint's tensors outside the trunk."""
    pixels: tuple[Pixels | None, Pixels | None] = (None, None)
    """Mean and standard deviation with which its images were normalised, from the configuration beside the checkpoint; None if
    unknown."""


def read_parent(path: str | Path, settings: HandOverSettings | None = None) -> Parent:
    """Reads a parent from the folder of a stage, or from any checkpoint that `translate.read_source` opens. Raises UserError."""
    settings = settings or HandOverSettings()
    if (record := RunFolder(Path(path)).record()) and not record.get("finished"):
        raise UserError(f"init_from: {path} is not finished; to start from it as it is, "
                        "name one of its checkpoints (checkpoints/step-N)")
    try:
        source = read_source(path, settings.container)
    except UserError as error:
        raise UserError(f"init_from: {error}") from None
    return parent_of(path, source, settings)


def parent_of(path: str | Path, source: NamedCheckpoint, settings: HandOverSettings) -> Parent:
    """Returns the trunk of an opened checkpoint. Raises UserError if the checkpoint has none."""
    try:
        trunk, hints = source.trunk(), read_hints(source.description)
    except UserError as error:
        raise UserError(f"init_from: {error}") from None
    ignored = KeyReport()
    for report in (source.report, trunk.report):
        for name in report.ignored:
            ignored.note(ignored.ignored, name, report.reasons.get(name, "outside the trunk"))
    for name in source.outside:
        ignored.note(ignored.ignored, name, "of the masked model, outside its trunk")
    classes = source.description.record.get("classes") or source.description.config.get("label_names")
    return Parent(Path(path), trunk.weights, tuple(classes) if classes else None, settings.grid or source.grid, ignored,
                  (hints.mean, hints.std))


def planned_parent(path: str | Path, trunk: nn.Module) -> Parent:
    """Returns the parent that a stage will be whose trunk is on the meta device: names, shapes and grid, without values."""

    def tensor(value: Tensor) -> Tensor:
        return Deferred(value, lambda: torch.zeros(value.shape, dtype=value.dtype, device="cpu"))

    weights = {name: tensor(value) for name, value in trunk.state_dict().items()}
    return Parent(Path(path), weights, None, facts.position_grid(trunk), KeyReport())


def seed_trunk(
    trunk: nn.Module, parent: Parent, settings: HandOverSettings | None = None, classes: tuple[str, ...] | None = None
) -> KeyReport:
    """Copies a parent's weights into a timm model, in place, and returns a report of every tensor.

    Positions, patch kernel and the norm after mean pooling follow the rules of `settings`. A patch kernel for RGB is adapted to
    other channels by timm's rule. One table of relative positions for all blocks is copied to each block, if the trunk has one
    table per block. The head is kept if `classes` equals the parent's class list, and is new otherwise; norms inside attention
    that the parent lacks are new. Raises UserError, before anything is copied, if another tensor is missing, unused or of another
    shape, because the parent then has another architecture.
    """
    state = trunk.state_dict()
    given, report, fresh, left = match(trunk, parent, settings, classes)
    bits: dict[str, int] = {}
    for name, value in state.items():
        if name in fresh:
            report.note(report.new, name, fresh[name])
            continue
        read = finite(given[name], name, f"init_from: {parent.path}").to(value.dtype)
        value.copy_(read)
        if name not in report.resized:
            report.loaded.append(name)
            bits[name] = _checksum(read)
    for name in [name for name in given if name in fresh or name in left]:
        report.note(report.ignored, name, fresh.get(name, "no part of the new trunk"))
    for name in parent.ignored.ignored:
        report.note(report.ignored, name, parent.ignored.reasons[name])
    _prove(trunk, bits)
    return report


class Match(NamedTuple):
    """How a parent's tensors fit a trunk."""

    given: dict[str, Tensor]
    """Under the trunk's names and in its sizes."""
    report: KeyReport
    """Of what was resized or left out for that."""
    fresh: dict[str, str]
    """Tensors of the trunk that keep their initial values -> reason."""
    left: set[str]
    """Tensors of the parent that are of no use: those of its own head."""


def match(
    trunk: nn.Module, parent: Parent, settings: HandOverSettings | None = None, classes: tuple[str, ...] | None = None
) -> Match:
    """Returns how a parent's tensors fit a trunk; of the trunk, which may be on the meta device, only names and shapes are used.
    Raises UserError for another architecture, as `seed_trunk` does."""
    settings = settings or HandOverSettings()
    state, classifier = trunk.state_dict(), facts.head_name(trunk)
    head = None if classifier is None else f"{classifier}."
    given, report = _fitted(trunk, state, parent, settings)
    same_classes = classes is not None and classes == parent.classes
    fresh = {name: why for name in state if (why := _why_fresh(name, head, given, settings, same_classes))}
    left = {name for name in given if name not in state and name.startswith((*PARTS_OF_A_HEAD, *([head] if head else [])))}
    wrong = [f"{name}: not in the checkpoint" for name in state if name not in given and name not in fresh]
    for name in given.keys() - fresh.keys() - left:
        here = f"{list(state[name].shape)} here" if name in state else "not here"
        if name not in state or given[name].shape != state[name].shape:
            wrong.append(f"{name}: {list(given[name].shape)} in the checkpoint, {here}")
    if wrong:
        more = f"\n  ... and {len(wrong) - 12} more" if len(wrong) > 12 else ""
        if "pos_embed" in given and "pos_embed" not in state:
            more += "\n  its positions were fixed ones: set student.positions=sincos"
        raise UserError(
            f"init_from: {parent.path} is of another architecture:\n  " + "\n  ".join(sorted(wrong)[:12]) + more
        )
    return Match(given, report, fresh, left)


def _fitted(
    trunk: nn.Module, state: Mapping[str, Tensor], parent: Parent, settings: HandOverSettings
) -> tuple[dict[str, Tensor], KeyReport]:
    """Returns the parent's tensors under the trunk's names and in its sizes, and the report of the changes."""
    given, report = dict(parent.weights), KeyReport()
    if SHARED_TABLE in given and SHARED_TABLE not in state:
        given = unshare_relative(given).weights
    places: tuple[tuple[Literal["fc_norm", "norm"], str], ...] = (("fc_norm", "norm"), ("norm", "fc_norm"))
    for here, there in places:
        if f"{here}.weight" in state and f"{here}.weight" not in given and f"{there}.weight" in given:
            done = with_norm(given, settings.norm, into=here)
            given = done.weights
            for name in done.report.ignored:
                report.note(report.ignored, name, done.report.reasons[name])
    _adapt_channels(trunk, state, given, report, parent.path)
    grid = facts.position_grid(trunk)
    if grid is None:
        return given, report
    tables = [name for name in given if name.endswith(("pos_embed", "relative_position_bias_table")) and name in state]
    if any(given[name].shape[-1] != state[name].shape[-1] for name in tables):
        return given, report  # another architecture
    old = parent.grid
    if old is None and any(given[name].shape != state[name].shape for name in tables):
        raise UserError(
            f"init_from: {parent.path} does not record the grid of patches for its positions; "
            "set hand_over.grid=[rows, columns]"
        )
    given, resized = resize_trunk(
        given, old or grid, grid, positions=settings.positions, kernel=settings.kernel, patch=facts.patch_size(trunk)
    )
    for name in resized.resized:
        if name in report.resized:  # resized for its channels before
            report.reasons[name] += f"; {resized.reasons[name]}"
        else:
            report.note(report.resized, name, resized.reasons[name])
    return given, report


def _adapt_channels(
    trunk: nn.Module, state: Mapping[str, Tensor], given: dict[str, Tensor], report: KeyReport, path: Path
) -> None:
    """Replaces the kernels in `given` that see the images (timm's `first_conv`) by kernels for the trunk's channels."""
    first = facts.configuration(trunk).get("first_conv") or ()
    for name in (f"{layer}.weight" for layer in ([first] if isinstance(first, str) else first)):
        if not (name in given and name in state) or given[name].ndim != 4 or given[name].shape[1] == state[name].shape[1]:
            continue
        old, channels = given[name], state[name].shape[1]
        try:
            given[name] = adapt_kernel(materialise(old), channels)
        except UserError as error:
            raise UserError(f"init_from: {path}: {error}") from None
        rule = "summed" if channels == 1 else f"repeated and scaled by 3/{channels}"
        report.note(report.resized, name, f"{list(old.shape)} to {list(given[name].shape)}, the kernel of RGB {rule} (timm)")


def _why_fresh(
    name: str, head: str | None, given: Mapping[str, Tensor], settings: HandOverSettings, same_classes: bool
) -> str | None:
    """Returns the reason why a tensor of the trunk keeps its initial values; None for a tensor that the parent has."""
    if head is not None and name.startswith(head) and not (same_classes and name in given):
        return "a head for other classes"
    if name in given:
        return None
    if name.startswith(("norm.", "fc_norm.")) and settings.norm == "drop":
        return "hand_over.norm=drop: starts fresh"
    return "a norm inside attention, which the parent does not have" if INNER_NORM in name else None


def _prove(trunk: nn.Module, bits: Mapping[str, int]) -> None:
    """Raises RuntimeError unless the tensors reported as loaded are in the trunk, by the checksums of the values read."""
    state = trunk.state_dict()
    unequal = [name for name, checksum in bits.items() if _checksum(state[name]) != checksum]
    if unequal:
        raise RuntimeError(f"tensors are not in the trunk as they were read: {unequal[:5]}")


def _checksum(value: Tensor) -> int:
    """Returns the CRC-32 of the elements, in order."""
    return zlib.crc32(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
