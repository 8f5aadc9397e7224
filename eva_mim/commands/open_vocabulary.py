"""`eva-mim evaluate CLIP --segment DIR`: each patch of an image has the class whose text is nearest, without training."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eva_mim.core.errors import UserError
from eva_mim.core.log import Progress, say

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from eva_mim.evaluate.segmentation import Segmented

IMAGES, MASKS = "images", ("annotations", "masks")
SHOWN, NAMED = 6, 5
"""Images on the sheet of predictions; broken images that are named."""


def segment(options: argparse.Namespace) -> None:
    """Measures a CLIP model on images with semantic masks, prints the figures of each class, and writes a sheet of predictions.
    Raises UserError."""
    import torch

    from eva_mim.core.distributed import all_reduce_sum, is_main, rank, setup, world_size
    from eva_mim.data.prompts import told_templates
    from eva_mim.data.source_settings import SegmentationSettings
    from eva_mim.data.sources.folder import FolderSource
    from eva_mim.data.sources.masks import Masks, read_mask_classes
    from eva_mim.evaluate.segmentation import confusion, figures
    from eva_mim.evaluate.sheet import coloured, write_sheet

    root = Path(options.segment)
    masks = next((root / name for name in MASKS if (root / name).is_dir()), None)
    if not (root / IMAGES).is_dir() or masks is None:
        raise UserError(f"{root}: expected folders {IMAGES} and {' or '.join(MASKS)}")
    ignore = SegmentationSettings().ignore if options.ignore is None else options.ignore
    classes = read_mask_classes(Path(options.classes) if options.classes else root / "classes.txt", ignore)
    device = setup()
    source, count = FolderSource(root / IMAGES, None, masks=Masks(masks, classes)), len(classes.names)
    model = _PatchTexts(options, classes.names, told_templates(options.templates or "openai"), device)
    matrix = torch.zeros(count, count, dtype=torch.int64, device=device)
    own, broken, shown = range(rank(), len(source), world_size()), 0, list[tuple[Any, str]]()
    progress = Progress("images", len(source))
    for index in own:
        progress.advance(world_size())
        try:
            sample = source.read(index)
        except (ValueError, OSError) as error:
            broken += 1
            if broken <= NAMED:
                sys.stderr.write(f"  left out: {source.key(index)}: {error}\n")
            continue
        image: Any = sample.image
        segmentation: Any = sample.segmentation
        truth = torch.from_numpy(segmentation).to(device)
        said = model.map_of(image, (truth.shape[0], truth.shape[1]))
        matrix += confusion(truth, said, count)
        if is_main() and len(shown) < 3 * SHOWN:
            shown += [(image, source.key(index)), (coloured(segmentation), "truth"),
                      (coloured(said.cpu().numpy()), "nearest text")]
    counts = all_reduce_sum(torch.cat([matrix.flatten(), matrix.new_tensor([broken])]))
    matrix, broken = counts[:-1].view_as(matrix), int(counts[-1])
    if not matrix.any():
        raise UserError(f"{root}: no pixel of {len(source)} images belongs to a class")
    if is_main():
        sys.stdout.write(table(figures(matrix), classes.names, len(source) - broken, broken))
        path = options.to or options.checkpoint / "segments.png"
        sys.stdout.write(f"{write_sheet(shown, len(shown), 3, path)}\n")


class _PatchTexts:
    """A CLIP model's patches beside the texts of classes."""

    def __init__(self, options: argparse.Namespace, classes: tuple[str, ...], templates: tuple[str, ...], device: Any):
        """Raises UserError for a folder that is no CLIP model, or whose tower has no patch features."""
        from eva_mim.evaluate.zeroshot import FolderClip
        from eva_mim.teachers import TeacherSettings
        from eva_mim.teachers.open_clip import stage_teacher

        clip = FolderClip(options.checkpoint, precision=options.precision or "fp32", device=device)
        self._weights, self._context = clip.class_weights(classes, templates), clip.context
        settings = TeacherSettings(kind="stage", name=str(options.checkpoint), project=True)
        settings.stand_at("--segment")
        self._tower, self._device, self._whole = stage_teacher(settings).to(device), device, options.whole

    def map_of(self, image: Image, size: tuple[int, int]) -> Tensor:
        """Returns [H, W] class numbers of an image, at its own size."""
        import torch
        from PIL import Image as Pillow
        from torch.nn import functional as F

        from eva_mim.data.views import to_tensor
        from eva_mim.evaluate.segmentation import slid

        side = self._tower.image_size
        scale = side / min(image.size)
        width, height = (side if self._whole else max(side, round(scale * length)) for length in image.size)
        pixels = to_tensor(image.resize((width, height), Pillow.Resampling.BICUBIC)).to(self._device)
        with torch.inference_mode():
            (scores,) = slid([pixels], side, self._scores)
            found: Tensor = F.interpolate(scores[None], size, mode="bilinear")[0].argmax(0)
        return found

    def _scores(self, windows: Tensor) -> Tensor:
        """Returns the cosines [B, K, h, w] of patches with the classes' texts."""
        from torch.nn import functional as F

        with self._context():
            found = self._tower(windows)
        cosines: Tensor = F.normalize(found.spatial.float(), dim=-1) @ self._weights.T
        return cosines.transpose(1, 2).reshape(len(windows), -1, *found.grid)


def table(found: Segmented, names: tuple[str, ...], images: int, broken: int) -> str:
    """Returns the figures as text: of the set, and of each class that is there or said."""
    if broken:
        say(f"  {broken} images could not be used")
    lines = [f"{images} images: mIoU {found.miou:.2f}, pixel accuracy {found.pixel_accuracy:.2f}"]
    lines += [f"{name:<40} {iou:>8.2f}" for name, iou in zip(names, found.ious, strict=True) if not math.isnan(iou)]
    return "\n".join(lines) + "\n"
