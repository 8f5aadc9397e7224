"""Frozen networks whose features are targets. This file has the settings; a teacher's module is imported when it is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PrivateAttr, model_validator

from eva_mim.core.errors import UserError
from eva_mim.core.registry import TEACHERS, lookup
from eva_mim.core.settings import RUNTIME, For, Settings

if TYPE_CHECKING:
    from eva_mim.core.contracts import Grid, Teacher


NETWORKS = For("kind", "open_clip", "timm", "stage", "start")


class TeacherSettings(Settings):
    """A frozen network whose features are the targets."""

    kind: str = "open_clip"
    """"open_clip" (image tower of a CLIP model), "timm" (any timm trunk), "stage" (folder of a finished stage of ours), "pixels"
    (each patch's own pixels, as MAE predicts them) or "start" (an anchor: the student's own trunk, as `init_from` brings it)."""
    name: str
    """Architecture name (open_clip, timm), the stage's folder, the patch side (pixels: "patch16"), or start: "trunk"."""
    weights: Annotated[str | None, For("kind", "open_clip", "timm", reread=True)] = None
    """open_clip: pretrained tag or local file; timm: "pretrained" or a local file. None: random weights (for tests only)."""
    image_size: Annotated[int, Field(ge=1)] | Literal["match"] | None = None
    """Input side in pixels; default the teacher's own (pixels: must be given). "match": that at which its grid of patches is the
    student's, so that nothing is interpolated (432 px of patches of 16 and 378 px of patches of 14 are both 27 x 27); where the
    student has several sizes, the teacher follows it from step to step."""
    adaptor: Annotated[str | None, For("kind", "stage")] = None
    """Of a masked stage: name of one of its own teachers, whose features its heads predict. null: the stage's own features."""
    mosaic: Annotated[bool, NETWORKS] = False
    """True: of a teacher with a large fixed size and patches alone (SAM), one input holds as many images as fit at the size at
    which their grids of patches are the student's (RADIOv2.5). The micro-batch must be a multiple of their number."""
    layer: Annotated[int, NETWORKS] = -1
    """Block whose patch features are the target, as a Python index; -1 is the last. The summary is read at the end."""
    summary: Annotated[Literal["pooled", "class_token", "mean"] | None, NETWORKS] = None
    """What stands for the whole image. "pooled": the network's own output, of a CLIP model its image embedding in the shared
    space; "class_token": that after the last norm (DINO); "mean": the mean of the last patches. Default pooled; SAM has none."""
    final_norm: bool = True
    """Apply the network's last norm to the features (pixels: normalise each patch)."""
    project: Annotated[bool | None, NETWORKS] = None
    """Apply CLIP's projection into the shared space to each patch (EVA), or read the patches before it (RADIO); default true if
    the network has one."""
    bands: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(None, min_length=1)
    """Channels of the images that are the teacher's input, counted from 0: of the 13 of Sentinel-2, [3, 2, 1] are red, green and
    blue. Default: all channels if the numbers agree; for a teacher of 3 channels, the one channel of grey images three times."""
    mean: Annotated[tuple[Annotated[float, Field(ge=0.0, le=1.0)], ...] | None, For("kind", "pixels")] = None
    """Mean of each channel, as `student.mean`; default ImageNet's, of RGB. Other kinds have the mean of their network."""
    std: Annotated[tuple[Annotated[float, Field(gt=0.0, le=1.0)], ...] | None, For("kind", "pixels")] = None
    """Standard deviation of each channel."""
    precision: Annotated[Literal["bf16", "fp32"] | None, NETWORKS] = None
    """Precision of the teacher's forward pass; its weights are kept in it. Default that of the run."""
    micro_batch: Annotated[int | None, Field(ge=1), NETWORKS, RUNTIME] = None
    """Most images in one forward pass of the teacher; default those of the student's."""
    weight: Annotated[float, Field(gt=0.0)] = 1.0
    """Factor on the losses against this teacher's features."""
    _path: str = PrivateAttr("teacher")
    _follows: tuple[int, ...] = PrivateAttr(())

    @property
    def path(self) -> str:
        """Path of these settings in the recipe, for messages: "teacher" or "teachers.NAME"."""
        return self._path

    @property
    def follows(self) -> tuple[int, ...]:
        """Sides in pixels at which the teacher sees images besides its own size, because its grid follows a student of several
        sizes; none for a teacher of one size."""
        return self._follows

    @property
    def side(self) -> int | None:
        """Input side in pixels; None for the teacher's own. Raises UserError for "match" where no student says the grid."""
        if self.image_size == "match":
            raise UserError(f"{self.path}.image_size=match: there is no student here whose grid could be matched; give pixels")
        return self.image_size

    def stand_at(self, path: str) -> None:
        """Sets the path of these settings in the recipe."""
        self._path = path

    @model_validator(mode="after")
    def _mean_and_std_are_a_pair(self) -> TeacherSettings:
        if len(self.mean or ()) != len(self.std or ()):
            raise ValueError(f"mean has {len(self.mean or ())} values, std {len(self.std or ())}; give both for "
                             "each channel")
        return self


def matched(settings: TeacherSettings, grids: Sequence[Grid], channels: int = 3) -> TeacherSettings:
    """Returns settings with the image size at which the teacher has a student's grid of patches, for `image_size: match`. With
    several grids the teacher keeps its own size and also takes those. Raises UserError."""
    from eva_mim.trunks.meta import meta_device

    own_size = settings.model_copy(update={"image_size": None})
    if settings.kind == "pixels":
        patch = settings.name.removeprefix("patch")
        if not patch.isdecimal():
            return own_size
        stride = int(patch)
    else:
        with meta_device():  # its patches are known from its own size
            own = build_teacher(own_size, channels, weights=False)
        stride = own.image_size // own.grid[0]
    sides = [stride * rows for rows, _ in grids]
    found = settings.model_copy(update={"image_size": sides[0] if len(sides) == 1 or settings.kind == "pixels" else None})
    found._follows = tuple(sides) if len(sides) > 1 else ()
    return found


def build_teacher(settings: TeacherSettings, channels: int = 3, *, weights: bool = True) -> Teacher:
    """Returns the frozen teacher for images with `channels` channels, on the default device; without `weights` its file is not
    read. Raises UserError for an unknown name, missing weights, an unusable trunk, and channels that do not fit."""
    build = lookup(TEACHERS, settings.kind, f"{settings.path}.kind")
    teacher: Teacher = build(settings if weights else settings.model_copy(update={"weights": None}))
    from eva_mim.teachers.bands import with_bands
    from eva_mim.teachers.mosaic import MosaicTeacher

    if settings.mosaic:
        teacher = MosaicTeacher(teacher)
    return with_bands(teacher, settings, channels)
