"""Settings of masked feature pretraining, with their rules. This file imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator

from eva_mim.core.files import sha256
from eva_mim.core.run_folder import head_file, store_index
from eva_mim.core.settings import Settings
from eva_mim.data import DataSettings
from eva_mim.data.view_settings import MaskSettings, ViewSettings
from eva_mim.run.recipe import Recipe
from eva_mim.students import HeadSettings, MaskedSettings
from eva_mim.targets import NormaliserSettings, TargetSettings
from eva_mim.tasks import GroupSettings, ObjectiveSettings, TargetTeacherSettings

if TYPE_CHECKING:
    from eva_mim.data.sampler import GroupBatch, Piece

TeacherName = Annotated[str, Field(pattern="^[a-z][a-z0-9_]*$")]


class ProbedSettings(DataSettings):
    """Images with maps for a probe of patches; at most `limit` are learned from, and `val_limit` measured."""

    limit: int | None = Field(500, ge=1)
    """Number of training images that are used, the first ones of the source; null: all."""
    val_limit: int | None = Field(500, ge=1)
    """Number of held-out images that are used, the first ones; null: all."""

    @model_validator(mode="after")
    def _maps_are_read(self) -> ProbedSettings:
        if without := [path for path, one in self.sources.items() if one.segmentation is None]:
            raise ValueError(f"evaluate.{without[0].replace('data', 'segmentation', 1)}.segmentation must be given: the maps")
        return self


class EvaluateSettings(Settings):
    """Limits on the images of an evaluation."""

    images: int = Field(5000, ge=1)
    """Number of held-out images, spread evenly over the set."""
    bank: int = Field(5000, ge=1)
    """Number of training images whose labels k-NN and the ridge probe read."""
    zeroshot: str | None = None
    """Name of a teacher that is a CLIP model and whose summary is learned: its text tower classifies what the student says of
    held-out images, by the classes' names in `data.templates`. null: no zero-shot accuracy."""
    segmentation: ProbedSettings | None = None
    """Images with segmentation maps, of which a ridge probe on patch features gives the mIoU; null: none."""


class StageRecipe(Recipe):
    """Settings of a masked-feature stage."""

    init_heads: str | None = None
    """Folder of an earlier masked stage whose heads start those of the teachers with the same names; others start anew."""
    teacher: TargetTeacherSettings | None = None
    """The only teacher: the same as `teachers` with one teacher of the name "teacher"."""
    teachers: dict[TeacherName, TargetTeacherSettings] = {}
    """Several teachers by name; the student gets heads for each."""
    groups: dict[TeacherName, GroupSettings] = {}
    """Parts of each step with teachers, images and sizes of their own, by name; none: all teachers teach all images."""
    student: MaskedSettings
    targets: TargetSettings = TargetSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    """Losses against each teacher without an `objective` of its own."""
    normaliser: NormaliserSettings = NormaliserSettings()
    """Normalisation of the spatial features of each teacher without a `normaliser` of its own."""
    teacher_drop: float = Field(0.0, ge=0.0, lt=1.0)
    """Probability that the loss of an image against a teacher does not count, drawn for each image and teacher; the teacher whose
    weighted loss of the image is the largest always counts (UNIC, Sariyildiz et al. 2024: 0.5)."""
    mask: MaskSettings = MaskSettings()
    view: ViewSettings = ViewSettings()
    evaluate: EvaluateSettings = EvaluateSettings()

    @model_validator(mode="after")
    def _somebody_teaches(self) -> StageRecipe:
        if (self.teacher is None) != bool(self.teachers):
            given = f"teachers has {', '.join(self.teachers)}" if self.teachers else "neither is given"
            raise ValueError(f"give teacher, for one, or teachers: {{NAME: ...}}, for several, not both ({given})")
        for name, settings in self.teachers.items():
            settings.stand_at(f"teachers.{name}")
        return self

    @property
    def all_teachers(self) -> dict[str, TargetTeacherSettings]:
        """Settings of every teacher by name."""
        return self.teachers if self.teacher is None else {"teacher": self.teacher}

    @property
    def all_groups(self) -> dict[str, GroupSettings]:
        """Settings of every group by name; without groups of one that has everything."""
        return self.groups or {"all": GroupSettings(batch=self.run.global_batch)}

    @model_validator(mode="after")
    def _groups_make_a_step(self) -> StageRecipe:
        if not self.groups:
            return self
        known, taught = self.all_teachers, set[str]()
        for name, group in self.groups.items():
            if unknown := [one for one in group.teachers or () if one not in known]:
                raise ValueError(f"groups.{name}.teachers: {', '.join(unknown)} are no teachers; known: {', '.join(known)}")
            taught |= set(group.teachers or known)
        if idle := [one for one in known if one not in taught]:
            raise ValueError(f"groups: no group has {', '.join(idle)}; add them to a group's teachers, or leave them out")
        if (total := sum(group.batch for group in self.groups.values())) != self.run.global_batch:
            said = " + ".join(f"groups.{name}.batch={group.batch}" for name, group in self.groups.items())
            raise ValueError(f"{said} = {total} is not run.global_batch={self.run.global_batch}")
        if self.run.zero_stage == 3 and any(group.ranks for group in self.groups.values()):
            raise ValueError("run.zero_stage=3: each layer is gathered by all processes together, so that all must run the same "
                             "ones; set run.zero_stage=2, or groups.*.ranks=null")
        several = any(len(group.sizes or ()) > 1 for group in self.groups.values()) or len(
            {group.sizes for group in self.groups.values()}) > 1
        if several and self.mask.replay:
            raise ValueError("mask.replay=true stores masks of one size; give all groups one image_size, or set it to false")
        return self

    def pieces(self, rank: int, world: int) -> list[Piece]:
        """See `Recipe`; the groups' micro-batches follow one another."""
        from eva_mim.data.sampler import cut_groups

        return cut_groups(self.group_batches, rank, world) if self.groups else super().pieces(rank, world)

    @property
    def group_batches(self) -> list[GroupBatch]:
        """Name, images of a step, micro-batch and number of processes of each group; empty without groups."""
        from eva_mim.data.sampler import GroupBatch

        return [GroupBatch(name, group.batch, group.micro_batch or self.run.micro_batch, group.ranks)
                for name, group in self.groups.items()]

    def objective_of(self, name: str) -> ObjectiveSettings:
        """Returns the losses against a teacher."""
        return self.all_teachers[name].objective or self.objective

    def head_of(self, name: str) -> HeadSettings:
        """Returns the head for a teacher."""
        return self.all_teachers[name].head or self.student.head

    def normaliser_of(self, name: str) -> NormaliserSettings:
        """Returns the normalisation of a teacher's features."""
        return self.all_teachers[name].normaliser or self.normaliser

    @model_validator(mode="after")
    def _grids_are_brought_together_in_one_way(self) -> StageRecipe:
        for name, one in self.all_teachers.items():
            if one.interpolate == "larger" and self.mask.ratio:
                raise ValueError(f"{one.path}.interpolate=larger predicts the whole finer grid, and mask.ratio={self.mask.ratio} "
                                 "some patches; set it to student, or mask.ratio=0")
            if one.interpolate == "larger" and self.head_of(name).upsample > 1:
                raise ValueError(f"{one.path}.interpolate=larger and a head with upsample={self.head_of(name).upsample} both "
                                 "make the student's grid finer; choose one")
        return self

    @model_validator(mode="after")
    def _a_dropped_teacher_leaves_another(self) -> StageRecipe:
        together = max(len(group.teachers or self.all_teachers) for group in self.all_groups.values())
        if self.teacher_drop and together == 1:
            raise ValueError(f"teacher_drop={self.teacher_drop} has no effect where each image has one teacher, which always "
                             "counts")
        return self

    @model_validator(mode="after")
    def _heads_alone_are_whole(self) -> StageRecipe:
        if self.optim.heads.alone and self.run.zero_stage == 3:
            raise ValueError(f"optim.heads.alone={self.optim.heads.alone}: with run.zero_stage=3 no process has the whole "
                             "weights of the layers that stand still; use run.zero_stage 0 to 2")
        return self

    @model_validator(mode="after")
    def _positions_have_one_source(self) -> StageRecipe:
        if self.student.positions == "sincos" and self.init_from is not None:
            raise ValueError("student.positions=sincos fixes the positions that init_from would bring; set it to learned")
        return self

    @model_validator(mode="after")
    def _zeroshot_has_a_teacher(self) -> StageRecipe:
        name = self.evaluate.zeroshot
        if name is not None and name not in self.all_teachers:
            raise ValueError(f"evaluate.zeroshot={name} is no teacher; known: {', '.join(self.all_teachers)}")
        if name is not None and not self.objective_of(name).summary:
            raise ValueError(f"evaluate.zeroshot={name}: its summary is not learned; set objective.summary")
        return self

    @model_validator(mode="after")
    def _masks_come_again(self) -> StageRecipe:
        if self.mask.replay and self.mask.ratio == 0:
            raise ValueError("mask.replay=true has no effect with mask.ratio=0")
        return self

    @model_validator(mode="after")
    def _views_are_whole(self) -> StageRecipe:
        if self.view.erase:
            raise ValueError(f"view.erase={self.view.erase} is for classifiers: what a student does not see is up to mask")
        return self

    def parents(self) -> dict[str, Path]:
        """Returns the parents of every recipe, and each teacher that is a stage's folder or a local file."""
        found = super().parents()
        if self.init_heads is not None:
            found["init_heads"] = Path(self.init_heads)
        if self.targets.cached is not None:
            return found | {"targets.cached": self.targets.cached}
        for teacher in self.all_teachers.values():
            if teacher.kind == "stage":
                found[f"{teacher.path}.name"] = Path(teacher.name)
            elif teacher.weights is not None and Path(teacher.weights).is_file():
                found[f"{teacher.path}.weights"] = Path(teacher.weights)
        return found

    def parent_hash(self, name: str, path: Path) -> str:
        """See `Recipe`; of a cache of targets the hash of its index, which has those of all files; of `init_heads` that of the
        heads."""
        if name == "init_heads":
            return sha256(head_file(path))
        return sha256(store_index(path)) if name == "targets.cached" else super().parent_hash(name, path)
