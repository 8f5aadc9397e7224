"""Frozen networks whose features are targets. This file has the settings; a teacher's module is imported when it is used."""

from __future__ import annotations

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
    student's, so that nothing is interpolated (432 px of patches of 16 and 378 px of patches of 14 are both 27 x 27)."""
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

    @property
    def path(self) -> str:
        """Path of these settings in the recipe, for messages: "teacher" or "teachers.NAME"."""
        return self._path

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


def matched(settings: TeacherSettings, grid: Grid, channels: int = 3) -> TeacherSettings:
    """Returns settings with the image size at which the teacher has this grid, for `image_size: match`. Raises UserError."""
    from eva_mim.trunks.meta import meta_device

    if settings.kind == "pixels":
        patch = settings.name.removeprefix("patch")
        return settings.model_copy(update={"image_size": int(patch) * grid[0] if patch.isdecimal() else None})
    with meta_device():  # its patches are known from its own size
        own = build_teacher(settings.model_copy(update={"image_size": None}), channels, weights=False)
    return settings.model_copy(update={"image_size": own.image_size // own.grid[0] * grid[0]})


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
