"""Classification of videos: a trunk that sees several frames, from a masked stage, a classifier or an earlier video stage.

Expect the first epochs to be no better than single frames would be: the positions of the frames start at zero.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from eva_mim.data.view_settings import VideoViewSettings
from eva_mim.run.program import Stage, leave
from eva_mim.students import VideoClassifierSettings
from finetune.classify import StageRecipe as ClassifyRecipe
from finetune.classify import build_classifier

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from eva_mim.data.splits import Splits
    from eva_mim.run.loop import Parts
    from eva_mim.run.stage import Built, Networks
    from eva_mim.students.video import VideoClassifier


class StageRecipe(ClassifyRecipe):
    """Settings of a video stage."""

    reads: ClassVar[str | None] = "video"
    student: VideoClassifierSettings
    view: VideoViewSettings = VideoViewSettings()


def networks(recipe: StageRecipe, classes: int | None = None, *, weights: bool = True) -> Networks:
    """Returns the classifier of videos with `classes` outputs; 400 (Kinetics-400's) if the number of classes is not known."""
    from eva_mim.run.stage import Networks
    from eva_mim.students.video import VideoClassifier

    return Networks(VideoClassifier(recipe.student, classes or 400))


def build(recipe: StageRecipe, device: torch.device) -> Built:
    """Returns classifier, data and evaluator of a recipe."""
    from eva_mim.weights.video import seed_times, write_video

    built = build_classifier(recipe, device, networks, video_parts)
    student: VideoClassifier = built.parts.task.student  # type: ignore[assignment]
    seed_times(student, recipe.init_from, built.seeded)

    def export(out: Path, weights: dict[str, torch.Tensor]) -> None:
        built.export(out, weights)
        write_video(out, weights, student, built.classes or ())

    return replace(built, export=export)


def video_parts(recipe: StageRecipe, student: VideoClassifier, splits: Splits, device: torch.device) -> Parts:
    """Returns task, data and evaluator of a classifier of videos."""
    from functools import partial

    from eva_mim.data.preparation import VideoPreparation
    from eva_mim.data.video_views import FrameChoice, VideoEvalView, VideoTrainView
    from eva_mim.evaluate.labels import VideoEvaluator
    from eva_mim.run.loaders import eval_loader, train_loader
    from eva_mim.run.loop import Parts
    from eva_mim.tasks.labels import Labels

    side, view = student.image_size, recipe.view
    kind = partial(VideoPreparation, choice=FrameChoice(student.frames, view.sampling, view.stride, view.clips))
    train = train_loader(recipe, splits.train, VideoTrainView(view, side, (student.mean, student.std)), kind)
    val = eval_loader(recipe, splits.val, VideoEvalView(view, side, student.frames), kind)
    task = Labels(student, len(splits.train.classes or ()), recipe.mix)
    return Parts(task, train, VideoEvaluator(val, device), recipe.data.max_broken)


STAGE = Stage("video", StageRecipe, networks, build)
main = STAGE.main


if __name__ == "__main__":
    leave(main())
