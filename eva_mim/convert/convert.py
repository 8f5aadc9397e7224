"""Conversion of any checkpoint to a file for other programs: renamed, resized, written, and proved by the outputs of both on
the same images."""

from __future__ import annotations

import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from eva_mim import __version__
from eva_mim.convert.architecture import find_architecture
from eva_mim.convert.targets import FORMATS, Format
from eva_mim.convert.verify import Proof, prove
from eva_mim.convert.writers import Model
from eva_mim.core.contracts import Grid
from eva_mim.core.errors import UserError
from eva_mim.core.files import sha256, write_json
from eva_mim.core.report import KeyReport
from eva_mim.weights.files.read import content_hash
from eva_mim.weights.files.sidecar import Description, at
from eva_mim.weights.names.eva import NormRule, with_norm
from eva_mim.weights.names.families import detect
from eva_mim.weights.names.name_tables import OUTSIDE
from eva_mim.weights.names.translate import NamedCheckpoint, read_source, trunk_of
from eva_mim.weights.resize import CLASS_ROWS, KernelRule, PositionRule, resize_trunk

LIBRARIES = ("torch", "timm", "open_clip_torch", "safetensors")
WHOLE = "open_clip_model"
"""Name of the file with both towers, in a folder that holds a CLIP model beside its image tower."""


@dataclass(frozen=True)
class Options:
    """Options of a conversion besides the target format."""

    container: str | None = None
    architecture: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Keywords of the timm model that names and shapes do not determine (num_heads, ...)."""
    grid: Grid | None = None
    """(rows, columns) of the source's patches."""
    image_size: tuple[int, int] | None = None
    """(height, width) of the result's images in pixels; None: the source's."""
    patch_size: int | None = None
    positions: PositionRule = "timm"
    kernel: KernelRule = "pseudo-inverse"
    norm: NormRule = "keep"
    dtype: str | None = None
    """Dtype of the floating tensors in the result; None: the source's."""
    images: Path | None = None
    """Folder of images for the parity check; None: drawn scenes and noise."""
    bound: float | None = None
    """Largest difference that parity allows, relative to the largest value of an output; None: by dtype (`parity.BOUNDS`)."""
    overwrite: bool = False


def convert(src: Path, dst: Path, to: str, options: Options | None = None) -> dict[str, Any]:
    """Converts a checkpoint, proves the result, and returns the record that lies beside it.

    Raises UserError, and leaves no file behind, for a source of unknown structure, a model that the format cannot hold, a result
    whose outputs differ from the source's, and a place that cannot be written.
    """
    try:
        return _convert(src, dst, to, options or Options())
    except OSError as error:
        raise UserError(f"{str(error.filename or dst)[:300]}: {error.strerror}") from None


def _convert(src: Path, dst: Path, to: str, options: Options) -> dict[str, Any]:
    form = FORMATS[to]
    check_destination(dst, to, options.overwrite)
    if dst.resolve() == src.resolve():
        raise UserError(f"{dst} is the source itself; choose another name")
    container = options.container or (WHOLE if form.whole and (src / f"{WHOLE}.safetensors").is_file() else None)
    source = read_source(src, container)
    if at(source.description.config, "model_args", "pos_embed") == "learn":
        raise UserError(f"{src}: its model has no positions at timm's or open_clip's, and student.positions=sincos gave it some, "
                        "which --to cannot write; the folder itself opens in timm (local-dir:)")
    if source.unknown and not (options.architecture or source.description.architecture):
        raise UserError(f"{source.unknown}\n  If it is under timm's names, name its model with --architecture")
    if options.grid and source.grid and options.grid != source.grid:
        raise UserError(f"--grid: {options.grid} patches, but the source has {source.grid}; leave it out")
    before = _model(source, form, options)
    after, changed = _changed(before, options)
    with staged(dst) as stage:
        path = stage / dst.name
        if not form.suffixes:
            path.mkdir()
        written = form.writer()(after, path, options.dtype)
        report = _joined(source, before, changed, written, after)
        proof = prove(
            source, before, after, path, form.runner(), dtype=options.dtype, bound=options.bound, images=options.images
        )
        if not proof.passed:
            failed = [f"{what}:\n{parity}" for what, parity in proof.parities.items() if not parity.passed]
            raise UserError(f"{src}: the outputs of the result differ from the source's; nothing was written\n" +
                            "\n".join(failed))
        record = _record(source, src, dst, to, replace(options, container=container), after, report, proof)
        record["files"] = {str(file.relative_to(stage)): sha256(file) for file in sorted(stage.rglob("*")) if file.is_file()}
        write_json(path / "convert.json" if path.is_dir() else stage / f"{dst.name}.convert.json", record)
    return record


def check_destination(dst: Path, to: str, overwrite: bool) -> None:
    """Raises UserError for a place that a format cannot be written to."""
    form = FORMATS[to]
    if form.suffixes and dst.suffix not in form.suffixes:
        raise UserError(f"{dst}: --to {to} writes a file; name it {' or '.join(f'{dst.stem}{end}' for end in form.suffixes)}")
    if not form.suffixes and dst.suffix in (".safetensors", ".pt", ".pth", ".bin", ".onnx"):
        raise UserError(f"{dst}: --to {to} writes a folder; name it {dst.with_suffix('')}")
    if dst.is_symlink():
        raise UserError(f"{dst} is a link; name its target, or another place")
    if dst.exists() and not overwrite:
        raise UserError(f"{dst} exists; add --overwrite to replace it")
    if dst.exists() and dst.is_dir() != (not form.suffixes):
        raise UserError(f"{dst} is a {'folder' if dst.is_dir() else 'file'}, and --to {to} writes the other; choose another name")
    if dst.is_dir() and any(dst.iterdir()) and not (dst / "convert.json").is_file():
        raise UserError(f"{dst} was not written by a conversion (no convert.json in it); it is not replaced")


@contextmanager
def staged(dst: Path) -> Iterator[Path]:
    """Yields a folder beside `dst`; afterwards its content replaces `dst` and the files beside it, `dst` last."""
    made = [folder for folder in dst.parents if not folder.exists()]
    dst.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{dst.name}.", dir=dst.parent))
    try:
        yield stage
        for item in sorted(stage.iterdir(), key=lambda item: item.name == dst.name):
            target = dst.parent / item.name
            if target.is_dir():  # a rename cannot replace a folder with files in it
                target.replace(stage / f".{item.name}")
            item.replace(target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        for folder in made:
            with suppress(OSError):  # the folder is not empty: it has a result
                folder.rmdir()


def _model(source: NamedCheckpoint, form: Format, options: Options) -> Model:
    """Returns the model to convert, at the source's own size."""
    if source.family is not None and source.family.text and form.whole:
        found = find_architecture(
            source.weights, source.family, described=source.description, name=options.architecture, arguments=options.arguments,
            rope=source.rope, grid=options.grid or source.grid,
        )
        return _with_trunk(Model(source.weights, found, source.family, rope=source.rope))
    weights = source.trunk().weights
    family = detect(weights) if source.family is not None else None
    grid, size = options.grid or source.grid, None
    if grid is None and family and family.patch and options.image_size and options.patch_size is None:
        rows, columns = (side // patch for side, patch in zip(options.image_size, family.patch, strict=True))
        pairs = (2 * rows - 1) * (2 * columns - 1) + CLASS_ROWS
        related = any(name.endswith("relative_position_bias_table") and len(value) == pairs for name, value in weights.items())
        size = options.image_size if related or rows * columns == family.tokens else None  # the option gives the source's size
    found = find_architecture(
        weights, family, described=source.description, name=options.architecture, arguments=options.arguments, image_size=size,
        rope=source.rope, grid=grid,
    )
    labels = source.description.record.get("classes") or source.description.config.get("label_names")
    outside = source.outside if form.outside else {}
    return Model(weights, found, family, None, outside, source.rope, tuple(labels) if labels else None, source.tower)


def _with_trunk(clip: Model) -> Model:
    """Returns a CLIP model together with its image tower as timm's model."""
    assert clip.family
    tower = trunk_of(clip.weights, clip.family).weights
    beside = Description(open_clip={"model_cfg": clip.architecture.config})
    found = find_architecture(
        tower, detect(tower), described=beside, image_size=clip.architecture.image_size, rope=clip.rope,
    )
    return replace(clip, trunk=Model(tower, found, detect(tower), rope=clip.rope))


def _changed(before: Model, options: Options) -> tuple[Model, KeyReport]:
    """Returns the model with another norm, image size or patch size, and the report of the changes."""
    report, weights, found, family = KeyReport(), before.weights, before.architecture, before.family
    if options.norm != "keep":
        if before.trunk:
            raise UserError(f"--norm {options.norm}: a CLIP model keeps its norm; convert the tower with --to timm")
        done = with_norm(weights, options.norm)
        weights, report = done.weights, done.report
        for name in report.new:  # the result has all tensors of its model
            like = before.weights[name.removeprefix("fc_")]
            weights[name] = torch.ones_like(like) if name.endswith("weight") else torch.zeros_like(like)
            report.reasons[name] = "norm=drop: fresh, ones and zeros"
    size = options.image_size or found.image_size
    patch = (options.patch_size, options.patch_size) if options.patch_size else family.patch if family else None
    if size != found.image_size or (family and patch != family.patch):
        if family is None or patch is None or found.grid is None:
            raise UserError(f"--image-size: {found.name} has no patches whose positions could be resized")
        if any(side % step for side, step in zip(size, patch, strict=True)):
            raise UserError(f"--image-size {size[0]}x{size[1]} is no multiple of the patch {patch[0]}x{patch[1]}")
        weights, resized = resize_trunk(
            weights, found.grid, (size[0] // patch[0], size[1] // patch[1]), positions=options.positions, kernel=options.kernel,
            patch=patch, prefix=family.prefix,
        )
        report = report.plus(resized)
    if weights is before.weights:
        return before, report
    family = detect(weights) if family else None
    keywords = {name: value for name, value in found.arguments.items() if name not in ("img_size", "patch_size", "global_pool")}
    found = find_architecture(weights, family, name=found.name or None, arguments=keywords, image_size=size, rope=before.rope)
    after = replace(before, weights=weights, architecture=found, family=family)
    return _with_trunk(after) if before.trunk else after, report


def _joined(source: NamedCheckpoint, before: Model, changed: KeyReport, written: KeyReport, after: Model) -> KeyReport:
    """Returns the report of every tensor in the result, and of every tensor of the source that is left out."""
    trunk = KeyReport() if before.trunk else source.trunk().report
    report = source.report.plus(trunk).plus(changed).plus(written)
    heads = OUTSIDE["decoder_pred" if "decoder_embed.weight" in source.outside else "lm_head"] if source.scheme == "eva" else {}
    theirs = {new: old for old, new in heads.items()}
    for name in [name for name in source.outside if name not in after.outside]:
        report.note(report.ignored, theirs.get(name, name), "outside a masked model's trunk: this format has no place for it")
    passing = set(trunk.new) & set(written.ignored)  # tensors that our names alone require
    report.new, report.ignored = ([name for name in names if name not in passing] for names in (report.new, report.ignored))
    names = written.loaded or [*after.weights, *after.outside]
    return replace(report, loaded=[name for name in names if name not in {*report.resized, *report.new}])


def _record(
    source: NamedCheckpoint, src: Path, dst: Path, to: str, options: Options, model: Model, report: KeyReport, proof: Proof
) -> dict[str, Any]:
    found = model.architecture
    return {
        "tool": f"eva-mim {__version__}",
        "versions": {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
        "source": {
            "path": str(src), "kind": source.checkpoint.kind, "container": source.checkpoint.container, "names": source.scheme,
            "tensors": len(source.checkpoint), "sha256": content_hash(src, options.container),
        },
        "to": to,
        "family": asdict(model.family) if model.family else None,
        "architecture": {name: getattr(found, name) for name in ("library", "name", "arguments", "config")},
        "image_size": list(found.image_size),
        "grid": list(found.grid) if found.grid else None,
        "rules": {name: getattr(options, name) for name in ("positions", "kernel", "norm", "dtype")},
        "keys": report.as_dict(),
        "parity": {what: parity.as_dict() for what, parity in proof.parities.items()},
        "answers_after_change": proof.answers,
        "open_with": FORMATS[to].client(model, dst),
    }
