"""Writes stores of targets: all ranks together, file by file, so that a killed command goes on where it was."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from eva_mim.core.contracts import MaskedBatch, Source, Teacher
from eva_mim.core.distributed import rank, run_on, run_on_main, world_size
from eva_mim.core.errors import UserError
from eva_mim.core.files import flush_folder, replacing, sha256, write_json, write_text
from eva_mim.core.log import Progress
from eva_mim.core.run_folder import STORE, STORE_INDEX
from eva_mim.core.settings import differences, few
from eva_mim.data.loader import Reader, load
from eva_mim.data.preparation import MaskedPreparation
from eva_mim.data.sampler import Place, evenly
from eva_mim.targets.store import PCA, SHARD, Basis, StoreFacts, packed, read_bases, read_facts, shard_name, unpacked

COSINES = "cosines"
"""Key of a file's metadata: by teacher the sum of cosines of stored and exact features, and their number."""
FITTED = 512
"""Images on which principal components are found."""
SPARE = 1.02
"""Factor on the forecast of bytes that has to be free: headers and folders."""


class Work(NamedTuple):
    """A file that is to be written."""

    split: str
    view: int
    shard: int
    positions: Sequence[int]
    """Of the images in the source."""

    def places(self) -> list[Place]:
        """Returns what the loader reads."""
        return [Place(self.view, index) for index in self.positions]


class Pair(NamedTuple):
    """Source and preparation of a split."""

    source: Source
    preparation: MaskedPreparation


def begin(folder: Path, facts: StoreFacts) -> int:
    """Makes the folder of a store, or goes on with an unfinished one; returns the bytes that are still to be written, 0 for one
    that is whole. Raises UserError for a store of other targets, and a disk that is too small."""
    if (folder / STORE).exists():
        if changed := differences(read_facts(folder).model_dump(mode="json"), facts.model_dump(mode="json")):
            raise UserError(f"{folder} holds other targets; choose another --out. What differs: {few(changed, 5)}")
        if (folder / STORE_INDEX).exists():
            return 0
    there = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    left = max(1, facts.bytes() - there)
    free = shutil.disk_usage(folder).free
    if left * SPARE > free:
        raise UserError(f"the targets have {left / 1e9:.4g} GB, and {free / 1e9:.4g} GB are free in {folder}: fewer --views, "
                        "--dtype int8, or another disk")
    write_text(folder / STORE, facts.model_dump_json(indent=1) + "\n")
    return left


def fit_once(folder: Path, pair: Pair, teachers: dict[str, Teacher], components: int, **how: Any) -> dict[str, float]:
    """Returns what `fit` returns; an unfinished store with as many principal components keeps those that it has."""
    if (folder / STORE).exists() and (known := read_facts(folder)).components == components:
        return known.variance
    return fit(folder, pair, teachers, components, **how)


def fit(
    folder: Path, pair: Pair, teachers: dict[str, Teacher], components: int, *, batch: int, workers: int, device: torch.device,
    autocast: Callable[[], Any],
) -> dict[str, float]:
    """Finds the principal components of each teacher's patches, on some images in their first view, and writes them; returns the
    share of the variance that they keep. One rank calls. Raises UserError for more components than a teacher has channels."""
    for name, teacher in teachers.items():
        if components > teacher.width:
            raise UserError(f"--pca {components}: teacher {name} has {teacher.width} channels")
    places = [Place(0, index) for index in evenly(len(pair.source), FITTED)]
    cut = [places[start : start + batch] for start in range(0, len(places), batch)]
    sums = {name: torch.zeros(teacher.width + 1, teacher.width, dtype=torch.float64) for name, teacher in teachers.items()}
    patches = dict.fromkeys(teachers, 0)
    for images in load(Reader(pair.source, pair.preparation), cut, workers):
        if not isinstance(images, MaskedBatch):
            continue
        for name, teacher in teachers.items():
            with torch.no_grad(), autocast():
                rows = teacher(images.views[teacher.image_size].to(device)).spatial.flatten(0, 1).double().cpu()
            sums[name] += torch.cat([rows.T @ rows, rows.sum(0, keepdim=True)])
            patches[name] += len(rows)
    made, kept = dict[str, Tensor](), dict[str, float]()
    for name, total in sums.items():
        mean = total[-1] / patches[name]
        values, vectors = torch.linalg.eigh(total[:-1] / patches[name] - mean.outer(mean))
        made |= {f"{name}.mean": mean.float(), f"{name}.components": vectors[:, -components:].T.flip(0).float().contiguous()}
        kept[name] = float(values[-components:].sum() / values.sum())
    _save(folder / PCA, made, {})
    return kept


def seconds_of_image(
    teachers: dict[str, Teacher], batch: int, device: torch.device, autocast: Callable[[], Any]
) -> float:
    """Returns the seconds that all teachers take for an image, measured on blank ones in batches of `batch`."""
    blanks = {name: torch.zeros(batch, len(one.mean), one.image_size, one.image_size, dtype=torch.uint8, device=device)
              for name, one in teachers.items()}
    began = 0.0
    for _ in range(2):  # the first pass is slower
        began = time.monotonic()
        for name, teacher in teachers.items():
            with torch.no_grad(), autocast():
                teacher(blanks[name]).summary.sum().item()  # waits for the device
    return (time.monotonic() - began) / batch


def write(
    folder: Path, facts: StoreFacts, pairs: dict[str, Pair], teachers: dict[str, Teacher], *, batch: int, workers: int,
    device: torch.device, autocast: Callable[[], Any],
) -> dict[str, float]:
    """Writes all files that are missing, and the index; returns the mean cosine of the stored features with the exact ones, by
    teacher. Every rank must call, after `begin` on the main rank; one that has done its files waits for the others. Raises
    UserError."""
    bases = {name: basis.to(device) for name, basis in read_bases(folder, facts).items()}
    own = [work for number, work in enumerate(_works(facts)) if number % world_size() == rank()]
    todo = [work for work in own if not (folder / shard_name(*work[:3])).exists()]
    rows, left = (sum(len(work.positions) for work in works) for works in (own, todo))
    progress = Progress("targets, views of images", rows * world_size(), (rows - left) * world_size())

    def entries() -> dict[str, dict[str, Any]]:
        for split, pair in pairs.items():
            works = [work for work in todo if work.split == split]
            cut = (work.places()[start : start + batch] for work in works for start in range(0, len(work.positions), batch))
            batches = load(Reader(pair.source, pair.preparation), cut, workers)
            for work in works:
                mine = [next(batches) for _ in range(0, len(work.positions), batch)]
                _save(folder / shard_name(*work[:3]), *_targets(work, mine, teachers, facts, bases, device, autocast))
                progress.advance(len(work.positions) * world_size())
        return {name: _entry(folder / name) for name in (shard_name(*work[:3]) for work in own)}

    every = run_on(entries, True)
    return run_on_main(lambda: _finish(folder, facts, {name: entry for each in every.values() for name, entry in each.items()}))


def _works(facts: StoreFacts) -> Iterator[Work]:
    for split, views in (("train", facts.views), ("val", 1)):
        positions: Sequence[int] = range(facts.rows("train")) if split == "train" else facts.val
        for view in range(views):
            for shard in range(0, len(positions), SHARD):
                yield Work(split, view, shard // SHARD, positions[shard : shard + SHARD])


def _targets(
    work: Work, batches: list[Any], teachers: dict[str, Teacher], facts: StoreFacts, bases: dict[str, Basis],
    device: torch.device, autocast: Callable[[], Any],
) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    """Returns the tensors of a file, and by teacher the sum of cosines of stored and exact features, and their number."""
    made, row_of = facts.empty(len(work.positions)), {index: row for row, index in enumerate(work.positions)}
    cosines = {name: [0.0, 0.0] for name in teachers}
    for images in batches:
        if not isinstance(images, MaskedBatch):  # no image of the batch can be read
            continue
        # A broken image of training is replaced by another one, which has its targets in a place of its own.
        index = images.index.tolist()
        taken = [number for number, place in enumerate(index) if place in row_of]
        rows = [row_of[index[number]] for number in taken]
        made["present"][rows] = 1
        for name, teacher in teachers.items():
            with torch.no_grad(), autocast():
                found = teacher(images.views[teacher.image_size].to(device, non_blocking=True))
            basis = bases.get(name)
            spatial, scale = packed(basis.down(found.spatial) if basis else found.spatial, facts.dtype)
            stored = basis.up(unpacked(spatial, scale)) if basis else unpacked(spatial, scale)
            cosine = F.cosine_similarity(stored.float(), found.spatial.float(), dim=-1).double()
            cosines[name] = [cosines[name][0] + float(cosine.sum()), cosines[name][1] + cosine.numel()]
            values = {"spatial": spatial, "summary": found.summary.float()} | ({} if scale is None else {"scale": scale})
            for kind, value in values.items():
                made[f"{name}.{kind}"][rows] = value.cpu()[taken]
    return made, cosines


def _save(path: Path, tensors: dict[str, Tensor], cosines: dict[str, list[float]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, {COSINES: json.dumps(cosines)})
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: {error}; what was written before stays, and the same command goes on with it") from None


def _entry(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        cosines = json.loads(file.metadata()[COSINES])
    return {"size": path.stat().st_size, "sha256": sha256(path), COSINES: cosines}


def _finish(folder: Path, facts: StoreFacts, entries: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Writes the index; returns the mean cosines by teacher."""
    if facts.components is not None:
        entries[PCA] = _entry(folder / PCA)
    every = [cosines for entry in entries.values() if (cosines := entry.pop(COSINES))]
    cosines = {name: sum(each[name][0] for each in every) / max(1.0, sum(each[name][1] for each in every)) for name in every[0]}
    flush_folder(folder)
    write_json(folder / STORE_INDEX, {"files": dict(sorted(entries.items())), "cosines": cosines})
    return cosines
