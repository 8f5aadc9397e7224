"""What a video stage leaves beside its trunk, and takes over from an earlier one: the positions of frames."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn

from eva_mim.core.errors import UserError
from eva_mim.core.files import write_json, write_text, write_weights
from eva_mim.core.report import KeyReport
from eva_mim.core.run_folder import HEAD, VIDEO
from eva_mim.students.video import VideoClassifier, resized_times
from eva_mim.weights.export import write_program
from eva_mim.weights.files.read import open_checkpoint

SCRIPT = "classify_video.py"
"""File of this package that is copied into the folder."""
TIMES = "time_embed"


class PlainVideo(nn.Module):
    """A classifier of videos of images in [0, 1]."""

    def __init__(self, classifier: VideoClassifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, image: Tensor) -> Tensor:
        """Returns [B, K] logits of [B, T, 3, S, S] float32 videos in [0, 1]."""
        logits: Tensor = self.classifier(255 * image)
        return logits


def write_video(out: Path, weights: dict[str, Tensor], student: VideoClassifier, classes: tuple[str, ...]) -> None:
    """Writes the files of a finished video stage besides those of its trunk."""
    if TIMES in weights:
        write_weights(out / HEAD, {TIMES: weights[TIMES]})
    write_json(out / VIDEO, {"classes": list(classes), "frames": student.frames, "image_size": student.image_size,
                             "time": "joint" if student.joint else "mean"})
    example = torch.zeros(2, student.frames, 3, student.image_size, student.image_size)
    inside = {f"classifier.{name}": value for name, value in weights.items()}
    write_program(out, PlainVideo(deepcopy(student)), inside, example)
    write_text(out / SCRIPT, Path(__file__).with_name(SCRIPT).read_text())


def seed_times(student: VideoClassifier, parent: str | None, report: KeyReport | None) -> None:
    """Starts the positions of frames from those of an earlier video stage, resized to another number of frames; of any other
    parent they stay zero. Raises UserError for positions of another width."""
    if report is None or parent is None or not student.joint:
        return
    if not (Path(parent) / VIDEO).is_file() or not (Path(parent) / HEAD).is_file():
        report.note(report.new, TIMES, "zero: the parent has no positions of frames")
        return
    times = open_checkpoint(Path(parent) / HEAD)[TIMES]
    if (theirs := times.shape[-1]) != (width := student.time_embed.shape[-1]):
        raise UserError(f"init_from: {parent} has positions of frames of width {theirs}, not {width}")
    with torch.no_grad():
        student.time_embed.copy_(resized_times(times.float(), student.frames))
    if times.shape[1] == student.frames:
        report.loaded.append(TIMES)
    else:
        report.note(report.resized, TIMES, f"{times.shape[1]} -> {student.frames} frames")
