"""`eva-mim evaluate CLIP --video DIR`: zero-shot accuracy on videos, by the mean of their frames' embeddings."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from eva_mim.commands.data.index import every_split, read_data
from eva_mim.core.errors import UserError
from eva_mim.core.settings import few


def zero_shot_videos(options: argparse.Namespace) -> None:
    """Measures a CLIP model on videos in class folders: those of `val`, if there are any, else all. Raises UserError."""
    import torch
    from torch.nn import functional as F

    from eva_mim.core.distributed import is_main, setup
    from eva_mim.data.loader import EvalLoader
    from eva_mim.data.preparation import VideoPreparation
    from eva_mim.data.prompts import told_templates
    from eva_mim.data.video_views import FrameChoice, VideoEvalView
    from eva_mim.data.view_settings import VideoViewSettings
    from eva_mim.evaluate.counts import TopCounts
    from eva_mim.evaluate.zeroshot import FolderClip, named_classes

    sources: dict[str, Any] = dict(every_split(read_data(options.video, ["data.video={}", *options.overrides])))
    source = sources.get("val") or sources["train"]
    if source.classes is None:
        raise UserError(f"{options.video} has no class folders, which name the classes")
    if without := source.unlabelled():
        raise UserError(f"{options.video}: {len(without)} videos have no label, such as {source.key(without[0])}")
    classes = source.classes if options.classes is None else named_classes(options.classes)
    if len(classes) != len(source.classes):
        raise UserError(f"--classes {options.classes}: {len(classes)} names for {len(source.classes)} classes "
                        f"({few(source.classes, 3)})")
    device = setup()
    clip = FolderClip(options.checkpoint, precision=options.precision or "fp32", device=device)
    spoken = tuple(name.replace("_", " ") for name in classes)
    weights = clip.class_weights(spoken, told_templates(options.templates or "openai"))
    frames = options.frames or 8
    preparation = VideoPreparation(VideoEvalView(VideoViewSettings(), clip.image_size, frames), 0, training=False,
                                  choice=FrameChoice(frames))
    batch = max(1, (options.batch or clip.batch) // frames)
    counts = TopCounts(device)
    with torch.inference_mode():
        for one in (one.to(device) for one in EvalLoader(source, preparation, batch, options.workers)):
            with clip.context():
                found = clip(one.images.flatten(0, 2))
            means = F.normalize(found.float(), dim=-1).view(one.size, frames, -1).mean(1)
            logits = F.normalize(means, dim=-1) @ weights.T
            counts.add(logits, one.labels, F.cross_entropy(logits, one.labels, reduction="sum"))
    figures = counts.figures()
    if is_main():
        figures = {name: f"{value:.2f}" for name, value in figures.items()}
        sys.stdout.write(f"{len(source)} videos, {frames} frames each: top-1 {figures['top1']}, top-5 {figures['top5']}\n")
