"""Masked feature prediction: a student predicts one or several teachers' features of patches and their summaries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eva_mim.core.batches import MaskedBatch
from eva_mim.core.contracts import Grid, StateGroup, Task
from eva_mim.core.losses import LossTerm, StepOutput
from eva_mim.core.timing import phase
from eva_mim.students.heads import SUMMARY
from eva_mim.targets import Cells, Target, Targets
from eva_mim.targets.normalise import Normaliser
from eva_mim.tasks.grids import cells_of, fine
from eva_mim.tasks.objectives import Objective, RowLosses, SummaryAngle, mean_of

VISIBLE = "_visible"
"""Ending of the name of a loss term of patches that the student sees."""
STATISTICS = "statistics"
"""Name of the checkpoint's file of running statistics."""


@dataclass
class Lesson:
    """What a student learns from one teacher: its losses, their weights, and running statistics that they need."""

    spatial: Objective | None = None
    """Loss of patches; None: they are not predicted."""
    masked: float = 1.0
    """Weight of the loss of masked patches, or of all where nothing is masked."""
    visible: float = 0.0
    """Weight of the loss of patches that are seen."""
    summary: Objective | SummaryAngle | None = None
    """Loss of the summary; None: it is not predicted."""
    summary_weight: float = 1.0
    normaliser: Normaliser | None = None
    """Normaliser of spatial features; None: they are predicted as they are."""
    upsample: int = 1
    """u: a patch of the student is u x u cells of the teacher."""
    interpolate: str | None = None
    """See `TargetTeacherSettings`."""
    turned: bool = False
    """True if normalised features are compared up to their rotation (`Normaliser.scaled`)."""
    scaled: bool = False
    """True if the loss of patches also fixes the length of predictions."""

    @property
    def running(self) -> dict[str, Normaliser | SummaryAngle]:
        """Running statistics of this teacher's features, by their names in a checkpoint."""
        kinds = {"normaliser": self.normaliser, "angle": self.summary if isinstance(self.summary, SummaryAngle) else None}
        return {name: one for name, one in kinds.items() if one is not None}

    def measure(self, target: Target) -> None:
        """Adds the features of a batch to the statistics."""
        if self.normaliser is not None:
            self.normaliser.add(target.spatial)
        if isinstance(self.summary, SummaryAngle):
            self.summary.add(target.summary)

    def weight(self, ending: str) -> float:
        """Returns the factor of a term by the ending of its name."""
        return {"": self.masked, VISIBLE: self.visible, SUMMARY: self.summary_weight}[ending]

    def native(self, prediction: Tensor) -> Tensor:
        """Returns predictions of spatial features [M, C] in the teacher's own space."""
        if self.normaliser is None:
            return prediction
        return self.normaliser.unscaled(prediction) if self.turned else self.normaliser.inverse(prediction)

    def normalised(self, features: Tensor) -> Tensor:
        """Returns a teacher's spatial features [M, C] as they are predicted."""
        if self.normaliser is None:
            return features
        return self.normaliser.scaled(features) if self.turned else self.normaliser(features)


class MaskedFeatures(Task):
    """Masked feature prediction: the student has heads for each teacher, which predict its patches and its summary."""

    def __init__(self, student: nn.Module, targets: Targets, lessons: Mapping[str, Lesson]):
        """`lessons`: by the teacher's name."""
        self.student, self.targets, self.lessons = student, targets, dict(lessons)
        self._running = {f"{teacher}.{name}": one for teacher, lesson in self.lessons.items()
                         for name, one in lesson.running.items()}
        self._measured = False
        """True in the first step, whose features are in the statistics before its loss is computed."""

    def prepare(self, student: Callable[..., Any], batches: list[MaskedBatch]) -> list[MaskedBatch]:
        """Brings the running statistics of all ranks up to date; in the first step from the features of its own batches."""
        if not self._running:
            return batches
        self._measured = not all(one.started for one in self._running.values())
        if self._measured:
            self.measure(batches)
        else:
            self._advance()
        return batches

    def measure(self, batches: list[MaskedBatch]) -> None:
        """Adds the features of micro-batches to the statistics and brings these up to date. Every rank must call."""
        summaries = []
        for batch in batches:
            found = self.targets.patches(batch, self.cells(batch, self.index(batch)))
            for name, target in found.items():
                self.lessons[name].measure(target)
            summaries.append({name: target.summary for name, target in found.items()})
        self._advance()
        for name, lesson in self.lessons.items():  # angles are measured from the mean direction
            if isinstance(lesson.summary, SummaryAngle):
                for each in summaries:
                    if name in each:
                        lesson.summary.add(each[name])
                lesson.summary.gather()

    def _advance(self) -> None:
        for one in self._running.values():
            if isinstance(one, Normaliser):
                one.advance()
            else:
                one.gather()

    def state(self) -> dict[str, StateGroup]:
        """Returns the running statistics, in one state group."""
        if not self._running:
            return {}
        for one in self._running.values():
            one.gather()
        kinds = {f"{owner}.{name}": (str(value.dtype).removeprefix("torch."), tuple(value.shape))
                 for owner, one in self._running.items() for name, value in one.state.items()}

        def place(name: str) -> tuple[Normaliser | SummaryAngle, str]:
            owner, _, leaf = name.rpartition(".")
            return self._running[owner], leaf

        def read(name: str) -> Tensor:
            one, leaf = place(name)
            return one.state[leaf]

        def put(name: str, value: Tensor) -> None:
            one, leaf = place(name)
            one.restore(leaf, value)

        return {STATISTICS: StateGroup(kinds, read, put)}

    def loss(self, student: Callable[..., Any], batch: MaskedBatch) -> StepOutput:
        """Returns the loss terms of each teacher: NAME, a mean over the M masked patches (without masks over all), NAME_visible
        over the patches that are seen, NAME_summary over the images. Where `batch.drops` has it, the terms of a teacher whose
        loss of an image is not the largest leave this image out, and `kept` is the share of images that stay."""
        index = self.index(batch)
        targets = self.targets.patches(batch, self.cells(batch, index))
        with phase("student"):
            predictions = self.predictions(student, batch, batch.masked, index)
            losses: dict[str, dict[str, RowLosses]] = {}
            for name, lesson in self.lessons.items():
                if name in targets and not self._measured:
                    lesson.measure(targets[name])
                losses[name] = self._losses(name, lesson, predictions, targets.get(name), batch)
            kept = None if batch.drops is None else self._kept(losses, batch, index)
            terms = {}
            for name, found in losses.items():
                for ending, rows in found.items():
                    theirs = kept[name][self._images_of(batch, index, name, ending)] if kept else None
                    terms[name + ending] = self._term(name, ending, rows, theirs)
        return StepOutput(terms, {})

    def _losses(
        self, name: str, lesson: Lesson, predictions: Mapping[str, Tensor], target: Target | None, batch: MaskedBatch
    ) -> dict[str, RowLosses]:
        """Returns the losses of a teacher by the ending of their term's name; `target` is None for one that does not teach this
        batch, of which no rows are predicted: its terms are 0 and depend on all its heads."""
        found = {}
        if lesson.spatial is not None:
            prediction = predictions[name]
            wanted = prediction.detach() if target is None else lesson.normalised(target.spatial)
            seen = self._seen(batch) * lesson.upsample**2 if target is not None else 0
            masked = len(prediction) - seen
            if lesson.masked:
                found[""] = lesson.spatial(prediction[:masked], wanted[:masked])
            if lesson.visible:
                found[VISIBLE] = lesson.spatial(prediction[masked:], wanted[masked:])
        if lesson.summary is not None:
            prediction = predictions[name + SUMMARY]
            found[SUMMARY] = lesson.summary(prediction, prediction.detach() if target is None else target.summary)
        return found

    def _term(self, name: str, ending: str, rows: RowLosses, kept: Tensor | None) -> LossTerm:
        """Returns the loss term of some rows. With several teachers the names of its metrics end in the teacher's name.
        `kept`: [rows], 1 or 0; None for all."""
        if kept is not None:
            share = {"summary_kept" if ending == SUMMARY else "kept": kept}
            rows = RowLosses(rows.loss * kept, {**rows.metrics, **share})
        after = (ending if ending == VISIBLE else "") + (f"_{name}" if len(self.lessons) > 1 else "")
        means = {f"{metric}{after}": mean_of(value) for metric, value in rows.metrics.items()}
        return LossTerm(rows.mean, self.lessons[name].weight(ending), means)

    def _kept(self, losses: Mapping[str, Mapping[str, RowLosses]], batch: MaskedBatch, index: Tensor) -> dict[str, Tensor]:
        """Returns for each teacher [B] fp32, 1 for the images whose loss counts: those from which it is not dropped, and those
        of which its weighted loss is the largest of all teachers'."""
        assert batch.drops is not None
        totals = []
        for name, found in losses.items():
            total = torch.zeros(batch.size, device=index.device)
            for ending, rows in found.items():
                loss, owner = rows.loss.detach(), self._images_of(batch, index, name, ending)
                sums, counts = (torch.zeros_like(total).index_add_(0, owner, one) for one in (loss, torch.ones_like(loss)))
                total += self.lessons[name].weight(ending) * sums / counts.clamp(min=1.0)
            totals.append(total if name in self.taught(batch) else torch.full_like(total, -torch.inf))
        worst = F.one_hot(torch.stack(totals, 1).argmax(1), len(totals)).bool()
        return dict(zip(losses, (worst | ~batch.drops).float().T, strict=True))

    def _images_of(self, batch: MaskedBatch, index: Tensor, name: str, ending: str) -> Tensor:
        """Returns the row of the image, [rows], of each loss of a term."""
        if name not in self.taught(batch):
            return index[:0]
        images = torch.arange(batch.size, device=index.device)
        if ending == SUMMARY:
            return images
        finer = self._match(batch, name)[1]
        if finer is not None:
            return images.repeat_interleave(finer[0] * finer[1])
        seen = self._seen(batch)
        owner = index // (self._patches(batch) // batch.size)
        owner = owner[len(owner) - seen:] if ending == VISIBLE else owner[:len(owner) - seen]
        return owner.repeat_interleave(self.lessons[name].upsample ** 2)

    def predictions(
        self, student: Callable[..., Any], batch: MaskedBatch, masked: Tensor | None, index: Tensor
    ) -> dict[str, Tensor]:
        """Returns predictions of the patches of `index`, [M, C] by the teacher's name, and of summaries, [B, C] by NAME_summary.
        The patches of `masked` are hidden."""
        wanted = {name: self._match(batch, name)[1] for name in self.taught(batch)}
        alike = len(wanted) == len(self.lessons) and not any(wanted.values())
        turns = {name: lesson.normaliser.turn() for name, lesson in self.lessons.items() if lesson.turned and lesson.normaliser}
        plain = alike and batch.window is None and not turns
        more = () if plain else (None if alike else wanted, batch.window, turns or None)
        found = student(self.images(batch), masked, index, *more)
        return found if isinstance(found, dict) else dict.fromkeys(self.lessons, found)

    def images(self, batch: MaskedBatch) -> Tensor:
        """Returns the student's view, [B, channels, H, W]."""
        return batch.views[batch.side or self.student.image_size]  # type: ignore[index]

    def taught(self, batch: MaskedBatch) -> list[str]:
        """Returns the names of the teachers of a batch."""
        return [name for name in self.lessons if batch.teachers is None or name in batch.teachers]

    def index(self, batch: MaskedBatch) -> Tensor:
        """Returns the positions of the predicted patches in the flattened [B * N]: the masked ones, then those that are seen."""
        if batch.target_index is None:
            return torch.arange(self._patches(batch), device=batch.index.device)
        return batch.target_index if batch.visible_index is None else torch.cat([batch.target_index, batch.visible_index])

    def cells(self, batch: MaskedBatch, index: Tensor) -> dict[str, Cells]:
        """Returns which cells of each teacher of a batch are the targets of the patches of `index`."""
        grid = self._grid(batch)
        found = {}
        for name in self.taught(batch):
            targets, predictions = self._match(batch, name)
            if predictions is not None:  # all of the finer grid
                index_there = torch.arange(batch.size * predictions[0] * predictions[1], device=index.device)
                found[name] = Cells(index_there, targets)
            else:
                found[name] = Cells(cells_of(index, grid, self.lessons[name].upsample), targets)
        return found

    def _match(self, batch: MaskedBatch, name: str) -> tuple[Grid | None, Grid | None]:
        """Returns the grids to which the features of a teacher and the student's patches are brought; None: they stay."""
        own, lesson = self._grid(batch), self.lessons[name]
        wanted = fine(own, lesson.upsample)
        there = self.targets.teachers[name].seen(wanted)[1]
        if there == wanted or lesson.interpolate is None or lesson.spatial is None:
            return None, None
        if lesson.interpolate == "larger" and there[0] * there[1] > wanted[0] * wanted[1]:
            return None, there
        return wanted, None

    def _grid(self, batch: MaskedBatch) -> Grid:
        grid: Grid = self.student.grid if batch.side is None else self.student.grid_at(batch.side)  # type: ignore[operator, assignment]
        return grid

    def counts(self, batch: MaskedBatch) -> dict[str, Tensor]:
        """Returns of each loss term the number of its patches (it may differ from batch to batch) or images."""
        seen = self._seen(batch)
        masked = self._patches(batch) if batch.target_index is None else len(batch.target_index)
        found: dict[str, float] = {}
        taught = self.taught(batch)
        for name, lesson in self.lessons.items():
            there = float(name in taught)
            if lesson.spatial is not None and lesson.masked:
                found[name] = there * masked
            if lesson.spatial is not None and lesson.visible:
                found[name + VISIBLE] = there * seen
            if lesson.summary is not None:
                found[name + SUMMARY] = there * batch.size
        return {name: torch.full((), float(count), device=batch.index.device) for name, count in found.items()}

    @staticmethod
    def _seen(batch: MaskedBatch) -> int:
        return 0 if batch.visible_index is None else len(batch.visible_index)

    def _patches(self, batch: MaskedBatch) -> int:
        rows, columns = self._grid(batch)
        return batch.size * rows * columns
