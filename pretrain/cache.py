"""`eva-mim cache`: computes the targets of a masked stage once, for training runs that then need no teacher. Light to import."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eva_mim.commands import positive, program_of
from eva_mim.core.errors import UserError
from eva_mim.run.program import guard

if TYPE_CHECKING:
    from torch import Tensor

    from eva_mim.core.contracts import Features, Teacher
    from eva_mim.teachers.open_clip import TextTower
    from pretrain.targets import Wanted

DTYPE = "int8"
"""Default type of patch features."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="eva-mim cache", description="Compute the teachers' features of numbered views of "
                                     "every image once, for runs with targets.cached=DIR (mim) or contrastive.distill.cached=DIR "
                                     "(clip). A command that was stopped goes on.")
    parser.add_argument("recipe", help="YAML file of a mim or clip stage, with its teacher or teachers")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings to change")
    parser.add_argument("--views", type=positive, required=True, metavar="K", help="views of an image; epoch e of a run takes "
                        "view e mod K")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the cache")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16", "fp8", "int8"], default=DTYPE, help="of patch features; fp8 "
                        "and int8 (default) have a scale for each patch")
    parser.add_argument("--pca", type=positive, metavar="C", help="store C principal components of the patch features")
    parser.add_argument("--hidden", action="store_true", help="store only the patches that the mask of a view hides "
                        "(mask.replay=true)")
    parser.add_argument("--program", choices=["mim", "clip"], help="the stage's program; default the name of the recipe's folder")
    parser.add_argument("--batch", type=positive, metavar="N", help="images in one forward pass; default that of the recipe")
    options = parser.parse_intermixed_args(argv)
    return guard(lambda: cache(options))


def _wanted(options: argparse.Namespace) -> Wanted:
    """Returns what the recipe of the command line wants of a cache. Raises UserError for a stage without teachers, and for
    options that have no effect there."""
    from eva_mim.core.recipe_files import read_yaml
    from eva_mim.core.resolve import resolve
    from pretrain import clip, mim, mim_recipe

    program = program_of(options.recipe, options.program)
    if program not in ("mim", "clip"):
        raise UserError(f"{options.recipe} is of {program}, which has no teacher: a cache is for mim and clip")
    tree, wanted = read_yaml(options.recipe), None
    if program == "mim":
        wanted = mim.targets_of(resolve(mim_recipe.StageRecipe, tree, options.overrides, options.recipe))
    else:
        wanted = clip.targets_of(resolve(clip.StageRecipe, tree, options.overrides, options.recipe))
    if wanted is None:
        raise UserError("contrastive.distill.teacher must be given: a cache of a clip stage has that teacher's embeddings")
    if wanted.folder is not None:
        raise UserError(f"{wanted.setting}: a cache is made from teachers; leave it out")
    if not wanted.patches and (options.pca or options.hidden or options.dtype != DTYPE):
        raise UserError("--dtype, --pca and --hidden are for features of patches; a clip stage has summaries alone, in fp32: "
                        "leave them out")
    wanted.check_storable()
    if options.hidden and not (wanted.mask and wanted.mask.replay):
        raise UserError("--hidden: masks are drawn anew in each epoch, so that every patch is needed; set mask.replay=true")
    return wanted


def cache(options: argparse.Namespace) -> None:
    """Writes the cache of a recipe. Raises UserError."""
    wanted = _wanted(options)
    recipe = wanted.recipe
    from contextlib import ExitStack

    from eva_mim.core.devices import set_arithmetic
    from eva_mim.core.distributed import run_on_main, setup, world_size
    from eva_mim.core.lock import locked
    from eva_mim.core.log import duration, say
    from eva_mim.data.masking import make_mask
    from eva_mim.data.preparation import ImageTextPreparation, MaskedPreparation
    from eva_mim.data.prompts import prompt_templates
    from eva_mim.data.sampler import cut_batch
    from eva_mim.data.splits import open_splits
    from eva_mim.data.store.write import Pair, begin, fit_once, seconds_of_image, write
    from eva_mim.data.views import EvalView, TrainView
    from eva_mim.engine.step import autocast
    from eva_mim.teachers.open_clip import TextTower
    from pretrain import clip, mim
    from pretrain.targets import facts_of

    device = setup(recipe.run.device, recipe.run.timeout_minutes)
    set_arithmetic(tf32=recipe.run.tf32, deterministic=recipe.run.deterministic)
    splits = open_splits(recipe.data)
    mask = hidden = None
    if wanted.patches:
        student: Any = mim.STAGE.on_meta(recipe).student  # refuses a teacher whose grid is not the student's
        if options.hidden and wanted.mask:
            mask, hidden = make_mask(student.grid, wanted.mask), wanted.mask.masked_patches(math.prod(student.grid))
    teachers = {name: teacher.to(device) for name, teacher in wanted.teacher_networks().items()}
    sizes = [teacher.image_size for teacher in teachers.values()]
    seed = recipe.run.seed
    text = TextTower(wanted.teachers[clip.TEACHER]).to(device) if wanted.captions else None
    view = TrainView(recipe.view, sizes)
    shown = partial(MaskedPreparation, view, seed, mask) if text is None else partial(
        ImageTextPreparation, view, seed, text.tokenize, prompt_templates(recipe.data.templates))
    pairs = {
        "train": Pair(splits.train, shown(view_seed=recipe.view.seed, with_views=("view", "mask", "caption"))),
        "val": Pair(splits.val, MaskedPreparation(EvalView(sizes, recipe.view.crop_pct), 0, training=False)),
    }
    batch = options.batch or cut_batch(recipe.run.global_batch, recipe.run.micro_batch, world_size())[0]
    precision = partial(autocast, device, recipe.run.precision)
    how = {"batch": batch, "workers": recipe.data.workers, "device": device, "autocast": precision}
    with ExitStack() as held:
        run_on_main(lambda: held.enter_context(locked(options.out)))
        found = run_on_main(lambda: fit_once(options.out, pairs["train"], teachers, options.pca, **how)) if options.pca else {}
        facts = facts_of(wanted, splits, teachers, options.views, options.dtype, device, options.pca, found, hidden, text)
        left = run_on_main(partial(begin, options.out, facts))
        if not left:
            return say(f"{options.out}: finished before, nothing to do")
        channels = recipe.data.channels_of_all
        images = facts.rows() * left / facts.bytes() / world_size()
        seconds = seconds_of_image(teachers, channels, batch, device, precision) * images
        say(f"{len(splits.train)} images x {options.views} views + {len(wanted.positions(splits))} held out, "
            f"{facts.bytes_of_row('train'):,} bytes each: {facts.bytes() / 1e9:.4g} GB")
        say(f"to write to {options.out}: {left / 1e9:.4g} GB, about {duration(seconds)} if the teachers are what takes longest")
        networks = teachers if text is None else {name: ImageAndText(one, text) for name, one in teachers.items()}
        made = write(options.out, facts, pairs, networks, **how)
    if missing := facts.rows() - made.images:
        sys.stdout.write(f"{missing} of {facts.rows()} views are of images that cannot be read: they have no targets\n")
    for name in teachers if wanted.patches else ():
        kept = f", {facts.variance[name]:.2%} of the variance in {options.pca} components" if options.pca else ""
        sys.stdout.write(f"{name}: cosine of stored and exact features {made.cosine(name):.6f}{kept}\n")
    sys.stdout.write(f"train with it: {wanted.setting}={options.out} view.seed={facts.inputs['view']['seed']}\n")


class ImageAndText:
    """A teacher with the text tower of the same CLIP model."""

    def __init__(self, teacher: Teacher, text: TextTower):
        self.image_size, self._teacher, self.captions = teacher.image_size, teacher, text

    def __call__(self, images: Tensor) -> Features:
        """Returns the features of [B, channels, S, S] pixels."""
        return self._teacher(images)
