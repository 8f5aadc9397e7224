"""Writes stored features: all ranks together, file by file, so that a killed command goes on where it was."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from eva_mim.core.batches import ImageTextBatch, MaskedBatch
from eva_mim.core.contracts import Features, Source
from eva_mim.core.distributed import rank, run_on, run_on_main, world_size
from eva_mim.core.errors import UserError
from eva_mim.core.files import flush_folder, replacing, sha256, write_json, write_text
from eva_mim.core.lock import locked
from eva_mim.core.log import Progress
from eva_mim.core.run_folder import STORE, STORE_INDEX
from eva_mim.core.settings import differences, few
from eva_mim.data.loader import Faults, Reader, load
from eva_mim.data.preparation import Preparation
from eva_mim.data.sampler import Place, evenly
from eva_mim.data.store.files import (
    PCA,
    Basis,
    FeatureStore,
    NetworkFacts,
    StoreFacts,
    file_name,
    hidden_places,
    packed,
    read_bases,
    read_facts,
    unpacked,
)

MADE = "made"
"""Key of a file's metadata, a `Made`."""
FITTED = 512
"""Images on which principal components are found."""
SPARE = 1.02
"""Factor on the forecast of bytes that has to be free: headers and folders."""


class Network(Protocol):
    """A frozen network whose features are stored."""

    @property
    def image_size(self) -> int: ...
    def __call__(self, images: Tensor) -> Features: ...


class ImageTextNetwork(Network, Protocol):
    """A network with embeddings of captions as well."""

    def captions(self, texts: Tensor) -> Tensor:
        """Returns the embeddings [T, C] of token ids [T, L]."""


class Made(NamedTuple):
    """What is known of a file besides its tensors, or of all files."""

    images: int
    """Rows with features; the images of the others could not be read."""
    cosines: dict[str, list[float]]
    """By network the sum of cosines of stored and exact spatial features, and their number."""

    def __add__(self, other: Made) -> Made:  # type: ignore[override]
        both = {name: [a + b for a, b in zip(sums, other.cosines[name], strict=True)] for name, sums in self.cosines.items()}
        return Made(self.images + other.images, both)

    def cosine(self, name: str) -> float:
        """Returns the mean cosine of a network's stored and exact spatial features."""
        total, count = self.cosines[name]
        return total / max(1.0, count)


class Work(NamedTuple):
    """A file that is to be written."""

    split: str
    view: int
    number: int
    positions: Sequence[int]
    """Of the images in the source."""

    def places(self) -> list[Place]:
        """Returns what the loader reads."""
        return [Place(self.view, index) for index in self.positions]


class Pair(NamedTuple):
    """Source and preparation of a split."""

    source: Source
    preparation: Preparation[MaskedBatch] | Preparation[ImageTextBatch]


def described(
    network: Any, channels: int, device: torch.device, *, patches: bool = True, caption: int = 0, **more: Any
) -> NetworkFacts:
    """Returns what is to be stored of a network that has `Teacher.facts`; `more` goes beside them. Every rank must call."""
    blank = torch.zeros(1, channels, network.image_size, network.image_size, dtype=torch.uint8, device=device)
    with torch.no_grad():
        found = network(blank)
    facts = network.facts() | {"sha256": network.fingerprint()} | more
    return NetworkFacts(patches=found.spatial.shape[1] if patches else 0, width=found.spatial.shape[2],
                        summary=found.summary.shape[1], caption=caption, network=facts)


def begin(folder: Path, facts: StoreFacts) -> int:
    """Makes the folder of a store, or goes on with an unfinished one; returns the bytes that are still to be written, 0 for one
    that is whole. One rank calls. Raises UserError for a store of other features, and a disk that is too small."""
    if (folder / STORE).exists():
        if changed := differences(read_facts(folder).identity(), facts.identity()):
            raise UserError(f"{folder} holds other features; remove it, or choose another folder. What differs: "
                            f"{few(changed, 5)}")
        if (folder / STORE_INDEX).exists():
            return 0
    there = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    left = max(1, facts.bytes() - there)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if left * SPARE > free:
        raise UserError(f"the features take {left / 1e9:.4g} GB, and {free / 1e9:.4g} GB are free in {folder}: fewer views, a "
                        "smaller type (int8), or another disk")
    write_text(folder / STORE, facts.model_dump_json(indent=1) + "\n")
    return left


def fit_once(folder: Path, pair: Pair, networks: Mapping[str, Network], components: int, **how: Any) -> dict[str, float]:
    """Returns what `fit` returns; an unfinished store with as many principal components keeps those that it has."""
    if (folder / STORE).exists() and (known := read_facts(folder)).components == components:
        return known.variance
    return fit(folder, pair, networks, components, **how)


def fit(
    folder: Path, pair: Pair, networks: Mapping[str, Network], components: int, *, batch: int, workers: int, device: torch.device,
    autocast: Callable[[], Any],
) -> dict[str, float]:
    """Finds the principal components of each network's patches, on some images in their first view, and writes them; returns the
    share of the variance that they keep. One rank calls. Raises UserError for more components than a network has channels."""
    places = [Place(0, index) for index in evenly(len(pair.source), FITTED)]
    cut = [places[start : start + batch] for start in range(0, len(places), batch)]
    sums, patches = dict[str, Tensor](), Counter[str]()
    for images in load(Reader(pair.source, pair.preparation), cut, workers):
        if not isinstance(images, MaskedBatch):
            continue
        for name, network in networks.items():
            with torch.no_grad(), autocast():
                rows = network(images.views[network.image_size].to(device)).spatial.flatten(0, 1).double().cpu()
            if components > rows.shape[1]:
                raise UserError(f"--pca {components}: teacher {name} has {rows.shape[1]} channels")
            total = torch.cat([rows.T @ rows, rows.sum(0, keepdim=True)])
            sums[name] = sums[name] + total if name in sums else total
            patches[name] += len(rows)
    made, kept = dict[str, Tensor](), dict[str, float]()
    for name, total in sums.items():
        mean = total[-1] / patches[name]
        values, vectors = torch.linalg.eigh(total[:-1] / patches[name] - mean.outer(mean))
        made |= {f"{name}.mean": mean.float(), f"{name}.components": vectors[:, -components:].T.flip(0).float().contiguous()}
        kept[name] = float(values[-components:].sum() / values.sum())
    _save(folder / PCA, made, Made(0, {}))
    return kept


def store_of(
    folder: Path, facts: StoreFacts, pairs: Mapping[str, Pair], networks: Mapping[str, Network], *, wait: bool = False, **how: Any
) -> FeatureStore:
    """Returns the store of these facts in a folder, made now unless it is there; `wait`: for another process that makes it.
    `how`: see `write`. Every rank must call. Raises UserError."""
    def is_whole() -> bool:
        return (folder / STORE_INDEX).is_file() and not begin(folder, facts)

    if not run_on_main(is_whole):
        with ExitStack() as held:
            run_on_main(lambda: held.enter_context(locked(folder, wait=wait)))
            if run_on_main(partial(begin, folder, facts)):
                write(folder, facts, pairs, networks, **how)
    return FeatureStore(folder)


def seconds_of_image(
    networks: Mapping[str, Network], channels: int, batch: int, device: torch.device, autocast: Callable[[], Any]
) -> float:
    """Returns the seconds that all networks take for an image, measured on blank ones in batches of `batch`."""
    blanks = {name: torch.zeros(batch, channels, one.image_size, one.image_size, dtype=torch.uint8, device=device)
              for name, one in networks.items()}
    began = 0.0
    for _ in range(2):  # the first pass is slower
        began = time.monotonic()
        for name, network in networks.items():
            with torch.no_grad(), autocast():
                network(blanks[name]).summary.sum().item()  # waits for the device
    return (time.monotonic() - began) / batch


def write(
    folder: Path, facts: StoreFacts, pairs: Mapping[str, Pair], networks: Mapping[str, Network], *, batch: int, workers: int,
    device: torch.device, autocast: Callable[[], Any],
) -> Made:
    """Writes all files that are missing, and the index; returns what is known of all. Every rank must call, after `begin` on the
    main rank; one that has done its files waits for the others. Raises UserError."""
    own = [work for number, work in enumerate(_works(facts)) if number % world_size() == rank()]
    todo = [work for work in own if not (folder / file_name(*work[:3])).exists()]
    rows, left = (sum(len(work.positions) for work in works) for works in (own, todo))
    progress, faults = Progress("features, views of images", rows * world_size(), (rows - left) * world_size()), Faults("image")

    def entries() -> dict[str, tuple[dict[str, Any], Made]]:
        if not (folder / STORE).is_file():
            raise UserError(f"{folder}, which rank 0 made, is not seen by rank {rank()}: choose a folder that all machines share "
                            "(--out, or EVA_MIM_CACHE for features of a probe)")
        bases = {name: basis.to(device) for name, basis in read_bases(folder, facts).items()}
        for split, pair in pairs.items():
            if not (works := [work for work in todo if work.split == split]):
                continue
            cut = (work.places()[start : start + batch] for work in works for start in range(0, len(work.positions), batch))
            batches = load(Reader(pair.source, pair.preparation), cut, workers)
            for work in works:
                read = (next(batches) for _ in range(0, len(work.positions), batch))
                whole = (one for one in read if faults.readable(one))
                _save(folder / file_name(*work[:3]), *_computed(work, whole, networks, facts, bases, device, autocast))
                progress.advance(len(work.positions) * world_size())
        return {name: _entry(folder / name) for name in (file_name(*work[:3]) for work in own)}

    every = run_on(entries, True)
    return run_on_main(lambda: _finish(folder, facts, {name: entry for each in every.values() for name, entry in each.items()}))


def _works(facts: StoreFacts) -> Iterator[Work]:
    for name, split in facts.splits.items():
        positions = split.positions
        for view in range(split.views):
            for start in range(0, len(positions), facts.file_rows):
                yield Work(name, view, start // facts.file_rows, positions[start : start + facts.file_rows])


def _computed(
    work: Work, batches: Iterator[MaskedBatch | ImageTextBatch], networks: Mapping[str, Network], facts: StoreFacts,
    bases: dict[str, Basis], device: torch.device, autocast: Callable[[], Any],
) -> tuple[dict[str, Tensor], Made]:
    """Returns the tensors of a file, and what is known of it."""
    made, row_of = facts.empty(work.split, len(work.positions)), {index: row for row, index in enumerate(work.positions)}
    hidden = facts.splits[work.split].hidden
    cosines = {name: [0.0, 0.0] for name in networks}
    for images in batches:
        # A broken image of training is replaced by another one, which has its features in a place of its own.
        index = images.index.tolist()
        taken = [number for number, place in enumerate(index) if place in row_of]
        rows = [row_of[index[number]] for number in taken]
        made["present"][rows] = 1
        if facts.labels:
            assert images.labels is not None
            made["label"][rows] = images.labels[taken]
        for name, network in networks.items():
            with torch.no_grad(), autocast():
                pixels = images.views[network.image_size] if isinstance(images, MaskedBatch) else images.images
                found = network(pixels.to(device, non_blocking=True))
            values = {"summary": found.summary.float()}
            if facts.networks[name].caption:
                assert isinstance(images, ImageTextBatch)
                with torch.no_grad(), autocast():
                    values["caption"] = cast(ImageTextNetwork, network).captions(images.texts.to(device)).float()
            if facts.networks[name].patches:
                exact, there = found.spatial, torch.ones(found.spatial.shape[:2], dtype=torch.bool, device=device)
                if hidden is not None:
                    assert isinstance(images, MaskedBatch)
                    assert images.masked is not None
                    places, there = hidden_places(images.masked.to(device), hidden)
                    exact = exact.gather(1, places[..., None].expand(-1, -1, exact.shape[2])) * there[..., None]
                basis = bases.get(name)
                spatial, scale = packed(basis.down(exact) if basis else exact, facts.dtype)
                stored = basis.up(unpacked(spatial, scale)) if basis else unpacked(spatial, scale)
                cosine = F.cosine_similarity(stored.float(), exact.float(), dim=-1)[there].double()
                cosines[name] = [cosines[name][0] + float(cosine.sum()), cosines[name][1] + cosine.numel()]
                values |= {"spatial": spatial} | ({} if scale is None else {"scale": scale})
            for kind, value in values.items():
                made[f"{name}.{kind}"][rows] = value.cpu()[taken]
    return made, Made(int(made["present"].sum()), cosines)


def _save(path: Path, tensors: dict[str, Tensor], made: Made) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, {MADE: json.dumps(made)})
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: {error}; what was written before stays, and the same command goes on with it") from None


def _entry(path: Path) -> tuple[dict[str, Any], Made]:
    """Returns the index's entry of a file, and what is known of it."""
    with safe_open(path, "pt") as file:
        made = Made(*json.loads(file.metadata()[MADE]))
    return {"size": path.stat().st_size, "sha256": sha256(path)}, made


def _finish(folder: Path, facts: StoreFacts, entries: dict[str, tuple[dict[str, Any], Made]]) -> Made:
    """Writes the index; returns what is known of all files. Raises UserError if no image could be read."""
    whole = sum((made for _, made in entries.values()), Made(0, {name: [0.0, 0.0] for name in facts.networks}))
    if not whole.images:
        raise UserError(f"none of {facts.rows()} images can be used")
    if facts.components is not None:
        entries[PCA] = _entry(folder / PCA)
    for parent in {above for name in entries for above in (folder / name).parents if above.is_relative_to(folder)}:
        flush_folder(parent)
    cosines = {name: whole.cosine(name) for name, one in facts.networks.items() if one.patches}
    write_json(folder / STORE_INDEX, {"files": {name: entry for name, (entry, _) in sorted(entries.items())},
                                      "images": whole.images, "cosines": cosines})
    return whole
