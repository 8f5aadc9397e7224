"""Masks by SAM's decoder from a student's features: the student stands in for SAM's image encoder.

    python masks_with_sam.py RUN SAM IMAGE X Y MASK.png [ADAPTOR]

RUN is the folder of a finished masked stage with SAM among its teachers (ADAPTOR, default `sam`), SAM a folder of transformers'
SamModel, (X, Y) a point of the object in pixels of IMAGE. Features before SAM's neck are what the student has learned; neck,
prompt encoder and mask decoder are SAM's own.
"""

import sys

import torch
from PIL import Image
from torch.nn import functional as F
from transformers import SamModel, SamProcessor

import eva_mim


def image_embeddings(sam, patches):
    """Returns SAM's image embeddings [B, C', h, w] from its features before the neck, [B, h * w, C], of a square image."""
    side = round(patches.shape[1] ** 0.5)
    return sam.vision_encoder.neck(patches.unflatten(1, (side, side)))


@torch.no_grad()
def main(run, folder, image, x, y, out, adaptor="sam"):
    """Writes the best of SAM's three masks for a point."""
    sam, processor, student = SamModel.from_pretrained(folder).eval(), SamProcessor.from_pretrained(folder), eva_mim.load(run)
    inputs = processor(Image.open(image).convert("RGB"), input_points=[[[float(x), float(y)]]], return_tensors="pt")
    made = processor.image_processor
    mean, std = (torch.tensor(part).view(-1, 1, 1) for part in (made.image_mean, made.image_std))
    images = inputs["pixel_values"] * std + mean  # a student takes images from 0 to 1, of as many patches as SAM's
    size = sam.config.vision_config.image_size // sam.config.vision_config.patch_size * student.patch[0]
    if size != images.shape[-1]:
        images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    said = student(images, adaptors=[adaptor])[adaptor]
    found = sam(image_embeddings=image_embeddings(sam, said.spatial), input_points=inputs["input_points"])
    (masks,) = processor.post_process_masks(found.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"])
    best = found.iou_scores[0, 0].argmax()
    Image.fromarray((masks[0, best].numpy() * 255).astype("uint8")).save(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
