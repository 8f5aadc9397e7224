"""`eva-mim teacher check`: prints facts of a teacher and figures of its features, before a student is trained on them."""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eva_mim.commands.teacher_rows import check_recipe, several, viewed
from eva_mim.core.errors import UserError
from eva_mim.core.recipe_files import read_yaml
from eva_mim.core.registry import TEACHERS, lookup
from eva_mim.core.resolve import resolve
from eva_mim.core.settings import parse
from eva_mim.data.source_settings import SceneSettings
from eva_mim.data.view_settings import ViewSettings
from eva_mim.run.program import guard
from eva_mim.students import MaskedSettings
from eva_mim.tasks import TargetTeacherSettings
from eva_mim.teachers import TeacherSettings, build_teacher

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from eva_mim.core.bands import Bands
    from eva_mim.core.contracts import Teacher

PICTURES = 32
"""Maximum number of pictures that are examined."""
CHUNK = 8
"""Pictures in one forward pass."""
CONSTANT = 0.999
"""Mean cosine of features with their mean over all images above which the features count as the same for every image."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code, 2 for a teacher that cannot be used."""
    parser = argparse.ArgumentParser(prog="eva-mim teacher", description="Look at a teacher before training with it.")
    parser.add_argument("action", choices=["check"], help="check: its facts, its features on some pictures, and what fits it")
    parser.add_argument(
        "teacher", help="recipe with a teacher section, or KIND:NAME[:WEIGHTS] such as open_clip:ViT-B-16:openai, "
        "timm:vit_small_patch14_dinov2.lvd142m:pretrained, stage:runs/demo/clip_teacher, pixels:patch16",
    )
    parser.add_argument("--name", help="name of one teacher of a recipe with several; default a row for each")
    parser.add_argument("overrides", nargs="*", metavar="a=b", help="settings of the teacher, such as image_size=336 layer=-2; "
                        "of a recipe with several its own, such as teachers.clip.layer=-2")
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder with pictures of yours; default: built-in drawings")
    parser.add_argument("--student", metavar="NAME", help="architecture of the student that shall learn from it")
    parser.add_argument("--student-image-size", type=int, metavar="N", help="its image size; default the architecture's own")
    options = parser.parse_intermixed_args(argv)
    if options.student is None and options.student_image_size is not None:
        parser.error("--student-image-size: needs --student NAME")
    return guard(lambda: check(options))


def check(options: argparse.Namespace) -> None:
    """Prints facts and figures of a teacher, or a row for each teacher of a recipe with several. Raises UserError for a teacher,
    or a student for it, that cannot be used."""
    if several(options.teacher, options.name):
        if options.student is not None:
            raise UserError(f"--student: {options.teacher} has a student of its own; change it by student.name=NAME")
        shown, pictures = pictures_of(options.images)
        return check_recipe(options.teacher, options.overrides, pictures, shown)
    settings = teacher_settings(options.teacher, options.overrides, options.name)
    from eva_mim.core.devices import pick_device
    from eva_mim.core.rng import seed_all

    shown, pictures = pictures_of(options.images)
    seed_all(0)  # for a teacher with random weights
    teacher, device = build_teacher(settings.model_copy(update={"bands": None})), pick_device("auto")
    _print(_facts(settings, teacher) | {"pictures": shown})
    if options.student is not None:
        student = {"name": options.student, "image_size": options.student_image_size}
        _print({"student": _fitting(parse(MaskedSettings, student, "--student"), teacher)})
    figures = measure(teacher.to(device), pictures, device)
    _print(_figures(figures) | {"time": f"{figures['milliseconds']:.1f} ms an image on {device}"})
    if figures["cosine_of_place"] > CONSTANT or figures["norm_max"] == 0.0:
        raise UserError(
            "teacher: the features are the same for every image: there is nothing to learn from them; look at its weights, "
            "choose another layer, or give other pictures with --images"
        )


def teacher_settings(text: str, overrides: Sequence[str], name: str | None = None) -> TeacherSettings:
    """Returns the settings of a teacher, from "KIND:NAME[:WEIGHTS]" or from a recipe (`name` chooses one of several teachers),
    with the overrides applied. Raises UserError for a text that names no teacher."""
    kind, colon, rest = text.partition(":")
    tree: Any
    if not colon or Path(text).is_file():
        tree = _section(read_yaml(text), text, name)
    else:
        lookup(TEACHERS, kind, "the teacher's kind")
        name, _, weights = rest.partition(":") if kind in ("open_clip", "timm") else (rest, "", "")
        tree = {"kind": kind, "name": name, "weights": weights or None}
    return resolve(TargetTeacherSettings, tree, overrides, text)


def _section(recipe: dict[str, Any], source: str, name: str | None) -> dict[str, Any]:
    teachers = recipe.get("teachers") or {"teacher": recipe.get("teacher")}
    known = [known for known, section in teachers.items() if isinstance(section, dict)] if isinstance(teachers, dict) else []
    if not known:
        raise UserError(f"{source}: no teacher section; name a recipe of masked pretraining, or a teacher as KIND:NAME")
    if name is None and len(known) > 1:
        raise UserError(f"{source}: {len(known)} teachers; choose one by --name: {', '.join(known)}")
    if name is not None and name not in known:
        raise UserError(f"--name: {source} has no teacher {name!r}; known: {', '.join(known)}")
    found: dict[str, Any] = teachers[name or known[0]]
    return found


def pictures_of(folder: Path | None) -> tuple[str, list[Image | Bands]]:
    """Returns a description of the pictures, and the pictures: 32 built-in drawings, or at most 32 of a folder, evenly spread.
    Raises UserError for an unusable folder."""
    from eva_mim.data.sources.videos import still

    if folder is None:
        from eva_mim.data.sources.scenes import SceneSource

        scenes = SceneSource(SceneSettings(), "val")
        return f"{PICTURES} built-in drawings", [still(scenes.read(index).image) for index in range(PICTURES)]
    from eva_mim.data.sources.folder import FolderSource

    if not folder.is_dir():
        raise UserError(f"--images: {folder} is not a folder")
    source = FolderSource(folder, None)
    count = min(PICTURES, len(source))
    if count < 2:
        raise UserError(f"--images: {folder} has one picture; at least two are needed")
    pictures = []
    for index in (number * (len(source) - 1) // (count - 1) for number in range(count)):
        try:
            pictures.append(still(source.read(index).image))
        except Exception as error:  # a file may be broken in any way
            raise UserError(f"--images: {source.key(index)}: {type(error).__name__}: {error}") from None
    return f"{count} of the {len(source)} in {folder}", pictures


def measure(teacher: Teacher, pictures: Sequence[Image | Bands], device: torch.device) -> dict[str, float]:
    """Returns figures of the teacher's features. Raises UserError for features that are not finite.

    `norm_mean`, `norm_sd`, `norm_min`, `norm_max`: lengths of the patch features. `cosine_of_mean`: mean cosine of the patch
    features with their mean direction; `cosine_of_place`: with the mean direction at their place in the grid. `mirrored`:
    mean cosine of patches with those of the mirrored image, mirrored back. `same`, `other`: mean cosine of the summaries of
    two random crops of one image, and of two images. `milliseconds`: time of the forward pass for one image.
    """
    import torch
    from torch import Tensor
    from torch.nn import functional as F

    images = viewed(teacher.image_size, pictures)
    teacher(images[:CHUNK].to(device))  # the first pass is slow
    seconds, lengths, mirrored, total = 0.0, list[Tensor](), list[Tensor](), torch.zeros(())
    for chunk in (part.to(device) for part in torch.split(images, CHUNK)):
        started = time.perf_counter()
        spatial = teacher(chunk).spatial.cpu().float()
        seconds += time.perf_counter() - started
        if broken := int((~spatial.isfinite()).sum()):
            raise UserError(
                f"teacher: {broken} of {spatial.numel()} features are not finite; look at its weights, or choose another layer"
            )
        mirror = teacher(chunk.flip(-1)).spatial.cpu().float()
        back = mirror.reshape(len(chunk), *teacher.grid, -1).flip(2).reshape(spatial.shape)
        lengths.append(spatial.norm(dim=-1))
        mirrored.append(F.cosine_similarity(spatial, back, dim=-1))
        total = total + F.normalize(spatial, dim=-1).double().sum(0)
    length, direction = torch.cat(lengths), total / len(images)
    same, other = _crops(teacher, pictures, device)
    return {
        "norm_mean": float(length.mean()),
        "norm_sd": float(length.std(correction=0)),
        "norm_min": float(length.min()),
        "norm_max": float(length.max()),
        "cosine_of_mean": float(direction.mean(0).norm()),
        "cosine_of_place": float(direction.norm(dim=-1).mean()),
        "mirrored": float(torch.cat(mirrored).mean()),
        "same": same,
        "other": other,
        "milliseconds": 1000 * seconds / len(images),
    }


def _crops(teacher: Teacher, pictures: Sequence[Image | Bands], device: torch.device) -> tuple[float, float]:
    """Returns the mean cosine of the summaries of two random crops: of one image, and of different images."""
    import torch
    from torch.nn import functional as F

    from eva_mim.core.rng import derive
    from eva_mim.data.views import TrainView

    view, summaries = TrainView(ViewSettings(), [teacher.image_size]), []
    for number in range(2):
        rngs = (random.Random(derive(0, "teacher check", index, number)) for index in range(len(pictures)))
        images = torch.stack([view(picture, rng)[teacher.image_size] for picture, rng in zip(pictures, rngs, strict=True)])
        parts = [teacher(part.to(device)).summary.cpu().float() for part in torch.split(images, CHUNK)]
        summaries.append(F.normalize(torch.cat(parts), dim=-1))
    cosines = summaries[0] @ summaries[1].T
    same, count = cosines.trace(), len(cosines)
    return float(same / count), float((cosines.sum() - same) / (count * (count - 1)))


def _facts(settings: TeacherSettings, teacher: Teacher) -> dict[str, str]:
    facts = teacher.facts()
    rows, columns = facts["grid"]
    without = {"stage": "the stage's own", "pixels": "none needed"}.get(settings.kind, "none, random")
    last = " (the last)" if facts["layer"] == (facts["blocks"] or 0) - 1 else ""
    return {
        "kind": settings.kind,
        "name": settings.name,
        "weights": settings.weights or without,
        "network": f"{facts['network']}, {facts['parameters'] / 1e6:.2f} M parameters",
        "image size": f"{facts['image_size']} px",
        "grid": f"{rows}x{columns} patches of {facts['image_size'] // rows} px",
        "width": f"{facts['width']}",
        "mean": "  ".join(f"{value:.4f}" for value in facts["mean"]),
        "std": "  ".join(f"{value:.4f}" for value in facts["std"]),
        "layer": f"{facts['layer']} of 0 to {facts['blocks'] - 1}{last}" if facts["blocks"] else "its end",
        "final norm": "yes" if facts["final_norm"] else "no",
        "projection": "yes" if facts["project"] else "no",
        "fingerprint": teacher.fingerprint()[:12],
    }


def _figures(figures: dict[str, float]) -> dict[str, str]:
    def shown(name: str, meaning: str) -> str:
        return f"{figures[name]:.4f}  {meaning}"

    lengths = "  ".join(f"{name} {figures[f'norm_{name}']:.4f}" for name in ("mean", "sd", "min", "max"))
    return {
        "patch norm": lengths,
        "cosine of mean": shown("cosine_of_mean", "of always predicting the mean direction: a student must do better"),
        "cosine of place": shown("cosine_of_place", "the same with one direction for each place in the grid"),
        "mirrored": shown("mirrored", "patches of the mirror image, mirrored back"),
        "same image": shown("same", "summaries of two random crops of one image"),
        "other image": shown("other", "summaries of crops of two images"),
    }


def _fitting(settings: MaskedSettings, teacher: Teacher) -> str:
    """Returns a text that states how the student fits. Raises UserError, with the sizes that would fit, if it does not."""
    from eva_mim.students.masked import MaskedStudent
    from eva_mim.tasks.grids import check_grids
    from eva_mim.trunks.meta import meta_device

    with meta_device():  # only its sizes are needed, not its weights
        student = MaskedStudent(settings.model_copy(update={"form": "mask_tokens"}), teacher.width)  # needs no mask
    check_grids(student.grid, student.image_size, teacher)
    rows, columns = student.grid
    return f"{settings.name} at {student.image_size} px fits: {rows}x{columns} patches"


def _print(rows: dict[str, str]) -> None:
    for name, value in rows.items():
        sys.stdout.write(f"{name:<16} {value}\n")
    sys.stdout.flush()
