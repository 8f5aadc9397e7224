"""`eva-mim features`: writes the features of images by a model, for search, duplicates and clusters."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from eva_mim.commands import positive
from eva_mim.core.errors import UserError
from eva_mim.core.log import say
from eva_mim.run.program import guard

if TYPE_CHECKING:
    from torch import Tensor

    from eva_mim.core.contracts import Features, Source, Teacher
    from eva_mim.data.store.files import FeatureStore

MAX_NPY = 2**33
"""Largest size in bytes of features that are kept in memory for a .npy file."""
QUERIES, MOST_NEAREST, MOST_COMPARED = 8, 11, 200_000
"""Rows of the sheet of neighbours, its largest number of neighbours a row, and of images that are compared."""
KEYS, PATCHES, NEAREST = ".keys.txt", ".patches.npy", ".nearest.png"
"""In the place of a file's suffix: keys and patches beside .npy, and the sheet of neighbours."""
CHUNK = 256
"""Images that are compared with all others at once."""
MODEL = "model"
"""Name of the network in the store."""
ALIKE = 0.98
"""Cosine from which two images are named as alike."""
Array = np.ndarray[Any, Any]


class Batch(NamedTuple):
    """Features of a few images of a split."""

    split: str
    places: list[int]
    keys: list[str]
    summary: Array
    """[B, D] fp32."""
    patches: Array | None
    """[B, N, C] fp32."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="eva-mim features", description="Write the features of images by a model, in fp32 and "
                                     "with its own view, as timm and open_clip compute them.")
    parser.add_argument("model", help="folder of a finished stage, its ema, or of what convert --to hf wrote; or a network as "
                        "KIND:NAME[:WEIGHTS], such as timm:vit_small_patch14_dinov2.lvd142m:pretrained")
    parser.add_argument("overrides", nargs="*", metavar="data.a=b", help="settings of the data")
    parser.add_argument("--on", required=True, metavar="RECIPE|FOLDER", help="the images")
    parser.add_argument("--to", required=True, type=Path, metavar="FILE", help=".parquet (key, split, summary), or .npy with the "
                        "keys beside it")
    parser.add_argument("--patches", action="store_true", help="also the features of each patch")
    parser.add_argument("--pool", choices=["summary", "mean"], default="summary", help="summary: the model's own output before a "
                        "head (default); mean: the mean of its patches")
    parser.add_argument("--nearest", type=positive, metavar="K", help="write a sheet of a few images and their K nearest ones, "
                        "and name pairs that are alike")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    parser.add_argument("--batch", type=positive, default=64, metavar="N", help="images in one forward pass (default 64)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="loader processes (default 1)")
    options = parser.parse_intermixed_args(argv)
    return guard(lambda: features(options))


def features(options: argparse.Namespace) -> None:
    """Writes the features of all splits. They are stored in FILE.partial first, so that a command that was stopped goes on; the
    folder is removed at the end. Raises UserError for a model, data or a file that cannot be used."""
    from contextlib import nullcontext

    from eva_mim.commands.data.index import every_split, read_data
    from eva_mim.core.distributed import run_on_main, setup
    from eva_mim.data.preparation import MaskedPreparation
    from eva_mim.data.splits import pixels_of, roots_of
    from eva_mim.data.store.files import SplitFacts, StoreFacts
    from eva_mim.data.store.write import Pair, described, store_of
    from eva_mim.data.views import EvalView

    if options.to.suffix not in (".parquet", ".npy"):
        raise UserError(f"--to {options.to}: must end in .parquet or .npy")
    if not options.to.absolute().parent.is_dir():
        raise UserError(f"--to {options.to}: {options.to.absolute().parent} is not a folder")
    if not options.overwrite and (there := [path for path in _made(options) if path.exists()]):
        raise UserError(f"{there[0]} exists; add --overwrite to replace it")
    if (options.nearest or 0) > MOST_NEAREST:
        raise UserError(f"--nearest {options.nearest}: at most {MOST_NEAREST} fit on a sheet")
    settings = read_data(options.on, options.overrides)
    splits = dict(every_split(settings))
    images = sum(map(len, splits.values()))
    if options.nearest and images > MOST_COMPARED:
        raise UserError(f"--nearest: {images} images are too many to compare with each other (at most {MOST_COMPARED})")
    device = setup()
    teacher = _opened(options.model, settings.channels_of_all).to(device)
    network = MeanOfPatches(teacher) if options.pool == "mean" else teacher
    facts = StoreFacts(
        networks={MODEL: described(network, len(teacher.mean), device, patches=options.patches, pool=options.pool)},
        inputs={"images": {name: source.fingerprint for name, source in splits.items()}, "roots": roots_of(settings),
                "pixels": pixels_of(settings), "resizing": teacher.resizing},
        splits={name: SplitFacts(images=len(source)) for name, source in splits.items()},
    )
    if options.to.suffix == ".npy" and facts.bytes() > MAX_NPY:
        raise UserError(f"--to {options.to}: {facts.bytes() / 1e9:.3g} GB of features do not fit into memory; write .parquet")
    preparation = MaskedPreparation(EvalView([teacher.image_size], **teacher.resizing), 0, training=False)
    pairs = {name: Pair(source, preparation) for name, source in splits.items()}
    store = store_of(options.to.with_name(f"{options.to.name}.partial"), facts, pairs, {MODEL: network}, batch=options.batch,
                     workers=options.workers, device=device, autocast=nullcontext)
    run_on_main(lambda: _write(store, splits, options))


class MeanOfPatches:
    """A network whose summary is the mean of its patches."""

    def __init__(self, teacher: Teacher):
        self._teacher, self.image_size = teacher, teacher.image_size
        self.facts, self.fingerprint = teacher.facts, teacher.fingerprint

    def __call__(self, images: Tensor) -> Features:
        """Returns the features of [B, channels, S, S] pixels."""
        found = self._teacher(images)
        return found._replace(summary=found.spatial.mean(1))


def _write(store: FeatureStore, splits: dict[str, Source], options: argparse.Namespace) -> None:
    """Writes the file that was asked for, and removes the store. Raises UserError."""
    write = _write_parquet if options.to.suffix == ".parquet" else _write_npy
    try:
        count, width = write(options.to, _batches(store, splits))
    except OSError as error:
        raise UserError(f"--to {options.to}: {error.strerror or error}") from None
    images = store.facts.rows()
    sys.stdout.write(f"{options.to}: {count} images x {width}{f', {images - count} left out' if count < images else ''}\n")
    if options.nearest:
        _write_nearest(options.to.with_suffix(NEAREST), list(_batches(store, splits)), splits, options.nearest)
    shutil.rmtree(store.folder)


def _made(options: argparse.Namespace) -> list[Path]:
    """Returns the files that a command writes."""
    beside = [NEAREST] if options.nearest else []
    if options.to.suffix == ".npy":
        beside += [KEYS, *([PATCHES] if options.patches else [])]
    return [options.to, *(options.to.with_suffix(suffix) for suffix in beside)]


def _opened(model: str, channels: int) -> Any:
    """Returns the network in a folder, or that of KIND:NAME[:WEIGHTS], as a teacher. Raises UserError."""
    from eva_mim.commands.teacher import teacher_settings
    from eva_mim.core.run_folder import CLIP_CONFIG, TIMM_CONFIG
    from eva_mim.teachers import TeacherSettings, build_teacher

    folder = Path(model)
    if (folder / CLIP_CONFIG).is_file():
        settings = TeacherSettings(kind="stage", name=model)
    elif (folder / TIMM_CONFIG).is_file():
        settings = TeacherSettings(kind="timm", name=f"local-dir:{model}", weights="pretrained")
    elif folder.exists() or ":" not in model:
        raise UserError(f"{model}: neither the folder of a finished stage (config.json) nor a network as KIND:NAME[:WEIGHTS]")
    else:
        settings = teacher_settings(model, [])
    settings.stand_at(model)
    return build_teacher(settings, channels)


def _batches(store: FeatureStore, splits: dict[str, Source]) -> Iterator[Batch]:
    """Yields the stored features, file by file."""
    for name, source in splits.items():
        first = 0
        for file in store.mapped(name):
            kept = file["present"].nonzero()[:, 0]
            places, patches = (first + kept).tolist(), file.get(f"{MODEL}.spatial")
            first += len(file["present"])
            if places:
                yield Batch(name, places, [source.key(place) for place in places], file[f"{MODEL}.summary"][kept].numpy(),
                            None if patches is None else patches[kept].numpy())


def _write_parquet(path: Path, batches: Iterator[Batch]) -> tuple[int, int]:
    """Writes columns key, split, summary and, if there are any, patches; returns their number and the width of a summary."""
    try:
        import pyarrow as pa  # type: ignore[import-not-found,import-untyped,unused-ignore]
        from pyarrow import parquet
    except ImportError:
        raise UserError("--to .parquet needs pyarrow (pip install 'eva-mim[parquet]'); .npy needs nothing") from None
    from eva_mim.core.files import replacing

    count = width = 0
    with replacing(path) as temporary:
        writer = None
        for batch in batches:
            width = batch.summary.shape[1]
            columns = {"key": pa.array(batch.keys), "split": pa.array([batch.split] * len(batch.keys)),
                       "summary": pa.FixedSizeListArray.from_arrays(pa.array(batch.summary.ravel()), width)}
            if batch.patches is not None:
                columns["patches"] = pa.FixedSizeListArray.from_arrays(
                    pa.FixedSizeListArray.from_arrays(pa.array(batch.patches.ravel()), batch.patches.shape[2]),
                    batch.patches.shape[1])
            table = pa.table(columns)
            writer = writer or parquet.ParquetWriter(temporary, table.schema)
            writer.write_table(table)
            count += len(batch.keys)
        if writer is not None:
            writer.close()
    return count, width


def _write_npy(path: Path, batches: Iterator[Batch]) -> tuple[int, int]:
    """Writes PATH [I, D], its keys, and [I, N, C] patches if there are any; returns I and D."""
    from eva_mim.core.files import replacing, write_text

    kept = list(batches)
    arrays = {path: [batch.summary for batch in kept]}
    if patches := [batch.patches for batch in kept if batch.patches is not None]:
        arrays[path.with_suffix(PATCHES)] = patches
    for place, parts in arrays.items():
        with replacing(place) as temporary, temporary.open("wb") as file:
            np.save(file, np.concatenate(parts))
    keys = [os.fsencode(key).decode("utf-8", "backslashreplace") for batch in kept for key in batch.keys]
    write_text(path.with_suffix(KEYS), "".join(f"{key}\n" for key in keys))
    return len(keys), kept[0].summary.shape[1]


def _write_nearest(path: Path, kept: list[Batch], splits: dict[str, Source], k: int) -> None:
    """Writes a sheet with a row for each of a few images: the image and its k nearest others, with their cosines. Names pairs
    that are alike."""
    import torch
    from torch.nn import functional as F

    from eva_mim.evaluate.sheet import write_sheet

    where = [(batch.split, place, key) for batch in kept for place, key in zip(batch.places, batch.keys, strict=True)]
    rows = F.normalize(torch.from_numpy(np.concatenate([batch.summary for batch in kept])), dim=1)
    k, found = min(k, len(rows) - 1), []
    for start in range(0, len(rows), CHUNK):
        scores = rows[start : start + CHUNK] @ rows.T
        scores[torch.arange(len(scores)), torch.arange(start, start + len(scores))] = -2.0  # an image is not its own neighbour
        found.append(scores.topk(k, dim=1))
    cosines, others = (torch.cat(parts) for parts in zip(*found, strict=True))
    chosen = np.linspace(0, len(rows) - 1, min(QUERIES, len(rows))).round().astype(int).tolist()

    def cells() -> Iterator[tuple[Any, str]]:
        for query in chosen:
            yield splits[where[query][0]].read(where[query][1]).image, where[query][2]
            for other, cosine in zip(others[query].tolist(), cosines[query].tolist(), strict=True):
                yield splits[where[other][0]].read(where[other][1]).image, f"{cosine:.3f} {where[other][2]}"

    write_sheet(cells(), len(chosen) * (k + 1), k + 1, path)
    sys.stdout.write(f"{path}: {len(chosen)} images, each with its {k} nearest\n")
    pairs = sorted({tuple(sorted((int(row), int(others[row, place])))) for row, place in (cosines > ALIKE).nonzero().tolist()})
    if pairs:
        sys.stdout.write(f"{len(pairs)} pairs are alike (cosine above {ALIKE}):\n")
        sys.stdout.writelines(f"  {where[one][2]}  {where[other][2]}\n" for one, other in pairs[:20])
        if len(pairs) > 20:
            say(f"  and {len(pairs) - 20} more")
        if len(pairs) > len(rows):
            say("  more pairs than images: these features hardly tell the images apart")
