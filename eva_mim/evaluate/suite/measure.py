"""Figures of a CLIP model on one set. Embeddings of its images are computed once, and kept in the cache folder."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from eva_mim.core.contracts import Features, Source
from eva_mim.core.distributed import all_gather_rows, all_reduce_sum
from eva_mim.core.settings import digest
from eva_mim.data.preparation import MaskedPreparation
from eva_mim.data.sources.index import cache_folder
from eva_mim.data.sources.shards import ShardSource
from eva_mim.data.store.files import NetworkFacts, SplitFacts, StoreFacts
from eva_mim.data.store.rows import Rows
from eva_mim.data.store.write import Pair, store_of
from eva_mim.data.views import EvalView
from eva_mim.evaluate.contrastive import PROMPTS, by_rank
from eva_mim.evaluate.features import CHUNK, ridge_accuracy
from eva_mim.evaluate.retrieval import retrieval
from eva_mim.evaluate.suite import metrics
from eva_mim.evaluate.suite.sets import Opened, captions_of
from eva_mim.evaluate.zeroshot import FolderClip

CLIP, IMAGES = "clip", "images"
"""Names of network and split in a store."""
LARGE = 10
"""Candidates from which a problem of WinoGAViL counts: DataComp takes those of 10 and 12."""
VOWELS = tuple("aeiou")


class Model(NamedTuple):
    """A CLIP model, and how its embeddings are computed."""

    clip: FolderClip
    sha256: str
    """Of its weights."""
    batch: int
    workers: int


def figures_of(model: Model, opened: Opened) -> dict[str, float]:
    """Returns the figures of a set: `images` that could be read, the main metric by its name, others in percent, and of sets with
    training images `probe_top1`. Every rank must call. Raises UserError."""
    rows = embeddings(model, opened.source, labels=bool(opened.classes))
    if opened.problems:
        found = _problems(model, opened, rows)
    elif not opened.classes:
        found = _retrieval(model, opened, rows)
    else:
        found = _classified(model, opened, rows)
    if opened.train is not None:
        found["probe_top1"] = _probe(model, opened, rows)
    return {"images": float(len(rows.places))} | found


def embeddings(model: Model, source: Source, *, labels: bool) -> Rows:
    """Returns the embeddings of all readable images, as the model gives them, computed unless they are in the cache folder. Every
    rank must call. Raises UserError."""
    clip = model.clip
    width = clip(torch.zeros(1, 3, clip.image_size, clip.image_size, dtype=torch.uint8, device=clip.device)).shape[1]
    stamp = source.index.facts.get("stamp") if isinstance(source, ShardSource) else None
    facts = StoreFacts(
        networks={CLIP: NetworkFacts(patches=0, width=0, summary=width, network={"sha256": model.sha256})},
        inputs={"images": source.fingerprint, "stamp": stamp, "resizing": clip.resizing, "size": clip.image_size,
                "mean": clip.mean, "std": clip.std, "precision": clip.precision, "device": clip.device.type},
        splits={IMAGES: SplitFacts(images=len(source))}, labels=labels)
    prepared = MaskedPreparation(EvalView([clip.image_size], **clip.resizing), 0, training=False)
    store = store_of(cache_folder() / "features" / digest(facts.identity())[:24], facts, {IMAGES: Pair(source, prepared)},
                     {CLIP: _Images(clip)}, batch=model.batch, workers=model.workers, device=clip.device, autocast=clip.context,
                     wait=True)
    return Rows.of(store, IMAGES, CLIP)


class _Images:
    """The image tower, as a network whose summaries are stored."""

    def __init__(self, clip: FolderClip):
        self._clip, self.image_size = clip, clip.image_size

    def __call__(self, images: Tensor) -> Features:
        """Returns the embeddings of [B, 3, S, S] uint8 images."""
        summary = self._clip(images)
        return Features(summary, summary.new_empty(len(summary), 0, 0), (0, 0))


def _unit(clip: FolderClip, rows: Tensor) -> Tensor:
    return F.normalize(rows.to(clip.device), dim=-1)


def _classified(model: Model, opened: Opened, rows: Rows) -> dict[str, float]:
    weights, own = model.clip.class_weights(opened.classes, opened.templates), rows.share()
    five = [(_unit(model.clip, own.features[slice(start, start + CHUNK)]) @ weights.T).topk(min(5, len(weights)), dim=1).indices
            for start in range(0, len(own.places), CHUNK)]
    every = all_gather_rows(torch.cat([torch.stack([own.places, own.labels], 1).to(model.clip.device), torch.cat(five)], 1)).cpu()
    places, labels, answers = every[:, 0], every[:, 1], every[:, 2:]
    best = answers[:, 0]
    found = {"top1": metrics.top1(labels, best), "mean_per_class": metrics.mean_per_class(labels, best)}
    if answers.shape[1] == 5:
        found["top5"] = metrics.top5(labels, answers)
    if opened.set.metric == "macro_f1":
        found["macro_f1"] = metrics.macro_f1(labels, best)
    if opened.groups is not None:
        right = (answers == labels[:, None]).any(1) if opened.set.metric == "worst_group_top5" else best == labels
        found[opened.set.metric] = metrics.worst_group(right, opened.groups[places])
    return found


def _retrieval(model: Model, opened: Opened, rows: Rows) -> dict[str, float]:
    assert isinstance(opened.source, ShardSource)
    texts, owner = captions_of(opened.source, rows.places.tolist(), opened.set)
    image = _unit(model.clip, rows.features[slice(0, len(rows.places))])
    text = _encoded(model.clip, texts)
    found = retrieval(image, text, owner.to(image.device), torch.arange(len(text), device=image.device))
    return {"mean_r1": (found["image_to_text_r1"] + found["text_to_image_r1"]) / 2} | found


def _encoded(clip: FolderClip, texts: list[str]) -> Tensor:
    """Returns the unit embeddings [T, C] of texts."""

    def encode(tokens: Tensor) -> Tensor:
        with torch.inference_mode(), clip.context():
            return clip.encode_text(tokens.to(clip.device)).float()

    return by_rank(torch.split(clip.tokenize(texts), PROMPTS), encode)


def _problems(model: Model, opened: Opened, rows: Rows) -> dict[str, float]:
    """Returns the mean Jaccard index of the large problems, as DataComp has it, and of all."""
    row_of = {place: row for row, place in enumerate(rows.places.tolist())}
    image = _unit(model.clip, rows.features[slice(0, len(rows.places))])
    readable = [one for one in opened.problems if all(place in row_of for place in one.candidates)]
    text = _encoded(model.clip, [prompted(one.cue) for one in readable])
    scores = []
    for cue, one in zip(text, readable, strict=True):
        chosen = image[[row_of[place] for place in one.candidates]]
        scores.append(metrics.jaccard((chosen @ cue).cpu(), torch.tensor(one.correct)))
    large = [score for score, one in zip(scores, readable, strict=True) if len(one.candidates) >= LARGE] or scores
    return {"jaccard": sum(large) / len(large), "jaccard_all": sum(scores) / len(scores), "problems": float(len(readable))}


def prompted(cue: str) -> str:
    """Returns the prompt of a cue, in lower case after its article (DataComp)."""
    word = cue.lower()
    return f"{'An' if word.startswith(VOWELS) else 'A'} {word}"


def _probe(model: Model, opened: Opened, rows: Rows) -> float:
    """Returns the accuracy of a ridge probe that is fitted on the training images."""
    assert opened.train is not None
    train, test = embeddings(model, opened.train, labels=True).share(), rows.share()
    return ridge_accuracy(test.features, test.labels, train.features, train.labels, classes=len(opened.classes),
                          device=model.clip.device, total=all_reduce_sum)

