"""Settings of one kind: refused beside another, left out where an override changes the kind; entries of lists by number."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pytest
import yaml

from eva_mim.core.errors import UserError
from eva_mim.core.resolve import resolve
from eva_mim.core.settings import For, Settings, as_tree, dependents, override, parse, put
from eva_mim.data import DataSettings
from eva_mim.data.view_settings import MaskSettings
from eva_mim.optim import OptimSettings
from eva_mim.pipeline.plan import plan
from eva_mim.students import HeadSettings, InitSettings, MaskedSettings
from eva_mim.targets import NormaliserSettings
from eva_mim.tasks import TargetTeacherSettings
from finetune.classify import StageRecipe as ClassifyRecipe
from pretrain.mim_recipe import StageRecipe as MimRecipe

PARTS = {"data": DataSettings, "mask": MaskSettings, "student": MaskedSettings, "student.init": InitSettings,
         "student.head": HeadSettings, "optim": OptimSettings, "teacher": TargetTeacherSettings,
         "normaliser": NormaliserSettings}
RECIPE: dict[str, Any] = {
    "teacher": {"name": "x"}, "student": {"name": "vit_nano_patch4_32"}, "data": {"source": "folder", "root": "/data"},
    "run": {"epochs": 1, "global_batch": 8}, "optim": {"lr": 1e-3},
}


class Case(NamedTuple):
    """Settings that a kind has for itself."""

    setting: str
    """That chooses the kind."""
    kind: str
    own: dict[str, Any]
    """Settings under the kind's section, each valid beside it."""
    others: str
    """Kinds beside which they have no effect."""
    needs: tuple[str, ...] = ()
    """Overrides that a change to another kind must bring along."""


FILES = {"root": "/data", "train": "a", "val": "b", "channels": 3, "window": [0.0, 9.0], "val_share": 0.1}
CASES = [
    Case("data.source", "folder", {**FILES, "captions": "c.jsonl", "val_captions": "d.jsonl", "caption_lines": True}, "scenes"),
    Case("data.source", "folder", {"root": "/data", "exif": True}, "scenes"),
    Case("data.source", "shards", {"classes": "c.txt", **FILES}, "scenes"),
    Case("data.source", "shards", {"classes": "c.txt", "bad_shards": "skip", "shuffle_gb": 2.0}, "folder scenes"),
    Case("data.source", "shards", {"captions": "c.jsonl", "caption_lines": True, "shuffle_gb": 2.0}, "list scenes"),
    Case("data.source", "list", {**FILES, "classes": "c.txt", "columns": {"label": "class"}}, "scenes"),
    Case("data.source", "list", {"columns": {"label": "class"}}, "folder shards scenes"),
    Case("data.source", "scenes", {"scenes": {"size": 16}}, "folder shards list", ("data.root=/data",)),
    Case("mask.kind", "block", {"exact": True, "min_block": 4, "min_aspect": 0.5}, "random"),
    Case("student.form", "visible", {"decoder": {"width": 64, "heads": 4}}, "mask_tokens"),
    Case("student.init.law", "eva02", {"std": 0.01}, "timm mae"),
    Case("optim.optimizer", "lamb", {"lamb": {"trust": [0.1, 1.0]}}, "adamw lars"),
    Case("optim.optimizer", "lars", {"lars": {"trust": 0.01}}, "adamw lamb"),
    Case("optim.optimizer", "adamw", {"betas": [0.9, 0.999], "eps": 1e-8}, "lars"),
    Case("student.head.kind", "mlp", {"width": 64}, "linear"),
    Case("student.head.kind", "mlp_v2", {"width": 64, "blocks": 2}, "linear"),
    Case("student.head.kind", "linear", {"upsample": 2}, ""),
    Case("normaliser.kind", "phi_s", {"steps": 9, "every": 3}, "none"),
    Case("teacher.kind", "open_clip", {"layer": -2, "project": False, "weights": "openai"}, "pixels"),
    Case("teacher.kind", "stage", {"summary": "pooled", "precision": "bf16", "micro_batch": 4, "mosaic": True}, "pixels"),
    Case("teacher.kind", "stage", {"adaptor": "clip"}, "open_clip timm pixels"),
    Case("student.positions", "cropped", {"position_grid": 16}, "learned sincos"),
    Case("teacher.kind", "timm", {"weights": "pretrained"}, "stage pixels"),
    Case("teacher.kind", "pixels", {"mean": [0.5] * 3, "std": [0.5] * 3}, "open_clip timm stage"),
]
PAIRS = [pytest.param(case, other, id=f"{case.setting}={case.kind}-{other}")
         for case in CASES for other in case.others.split()]


def recipe(case: Case, kind: str, own: bool = True) -> dict[str, Any]:
    """A recipe with the case's settings beside a kind."""
    tree = deepcopy(RECIPE)
    section = case.setting.rpartition(".")[0]
    if section == "data":
        tree["data"] = {"root": "/data"} if kind != "scenes" else {}
    put(tree, case.setting, kind)
    for name, value in case.own.items() if own else ():
        put(tree, f"{section}.{name}", value)
    return tree


def test_the_table_has_every_marked_setting() -> None:
    marked = {f"{path}.{name}" for path, model in PARTS.items() for name, field in model.model_fields.items()
              if any(isinstance(mark, For) for mark in field.metadata)}
    assert {f"{case.setting.rpartition('.')[0]}.{name}" for case in CASES for name in case.own} == marked


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.setting}={case.kind}")
def test_settings_of_the_kind_are_taken_and_written_back(case: Case) -> None:
    tree = recipe(case, case.kind)
    made = parse(MimRecipe, tree, "r.yaml")
    resolved = as_tree(made)
    assert parse(MimRecipe, yaml.safe_load(yaml.safe_dump(resolved)), "resolved.yaml") == made
    assert not any(setting.foreign for setting in dependents(MimRecipe, resolved))


@pytest.mark.parametrize(("case", "other"), PAIRS)
def test_settings_of_another_kind_are_mistakes_all_at_once(case: Case, other: str) -> None:
    foreign = [setting for setting in dependents(MimRecipe, recipe(case, other)) if setting.foreign]
    with pytest.raises(UserError) as caught:
        parse(MimRecipe, recipe(case, other) | {"maks": {}}, "r.yaml")
    _, *lines = map(str.strip, str(caught.value).splitlines())
    assert foreign
    assert {setting.path for setting in foreign} <= {line.partition(":")[0] for line in lines}
    assert any(line.startswith("maks: no such setting") for line in lines)
    for setting in foreign:
        (line,) = [line for line in lines if line.startswith(f"{setting.path}: is for ")]
        assert f"{case.setting}={case.kind}" in line or f" or {case.kind}" in line
        assert f"{case.setting} is {other}; leave it out, or set {case.setting}=" in line


@pytest.mark.parametrize(("case", "other"), PAIRS)
def test_an_override_of_the_kind_leaves_out_what_the_recipe_has_for_the_old_one(
    case: Case, other: str, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = [f"{case.setting}={other}", *case.needs]
    made = resolve(MimRecipe, recipe(case, case.kind), changed, "r.yaml")
    (line,) = capsys.readouterr().err.splitlines()
    under_the_other = recipe(case, case.kind)
    put(under_the_other, case.setting, other)
    gone = {setting.path for setting in dependents(MimRecipe, under_the_other) if setting.foreign}
    assert line.startswith(f"r.yaml: {case.setting}={other} leaves out ")
    assert line.endswith(f", set for {case.setting}={case.kind}")
    named = set(line.partition(" leaves out ")[2].rpartition(", set for ")[0].split(", "))
    assert gone <= named <= gone | {"data.train", "data.val", "teacher.weights"}
    # Nothing of it is in the result.
    defaults = parse(MimRecipe, {**RECIPE, "data": {"source": "scenes"}}, "r.yaml").model_dump()
    tree: Any = made.model_dump()
    for path in gone:
        value, default = tree, defaults
        for part in path.split("."):
            value, default = value[part], default[part]
        assert value == default, path


def test_what_an_override_writes_itself_is_never_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    tree = {**RECIPE, "mask": {"kind": "block", "min_block": 4}}
    with pytest.raises(UserError, match=r"mask\.min_block: is for mask\.kind=block, and mask\.kind is random"):
        resolve(MimRecipe, tree, ["mask.kind=random", "mask.min_block=8"], "r.yaml")
    with pytest.raises(UserError, match=r"student\.decoder: is for student\.form=visible"):
        resolve(MimRecipe, RECIPE, ["student.decoder.width=64"], "r.yaml")
    with pytest.raises(UserError, match=r"mask\.exact: is for mask\.kind=block"):
        resolve(MimRecipe, tree, ["mask={kind: random, exact: true}"], "r.yaml")
    assert resolve(MimRecipe, tree, ["mask={kind: random}"], "r.yaml").mask == MaskSettings(kind="random")
    assert capsys.readouterr().err == ""


def test_a_recipes_own_mistake_stays_one_under_an_override() -> None:
    """Only what fitted the old kind is left out."""
    tree = {**RECIPE, "optim": {"lr": 1e-3, "optimizer": "adamw", "lamb": {"adapt": "all"}}}
    with pytest.raises(UserError, match=r"optim\.lamb: is for optim\.optimizer=lamb"):
        resolve(MimRecipe, tree, ["optim.optimizer=lars"], "r.yaml")
    assert resolve(MimRecipe, tree, ["optim.optimizer=lamb"], "r.yaml").optim.optimizer == "lamb"


def test_a_name_that_each_source_reads_in_its_own_way_goes_with_the_source() -> None:
    tree = {**RECIPE, "data": {"source": "shards", "root": "/a", "train": "train-*.tar", "val": "val-*.tar"}}
    data = resolve(MimRecipe, tree, ["data.source=folder", "data.val=val"], "r.yaml").data
    assert (str(data.root), data.train, data.val) == ("/a", None, "val")
    assert resolve(MimRecipe, tree, ["data.source=shards"], "r.yaml").data.train == "train-*.tar"


def test_null_takes_a_setting_back_and_an_unknown_kind_is_one_mistake() -> None:
    assert parse(MimRecipe, {**RECIPE, "mask": {"kind": "random", "min_block": None}}, "r.yaml").mask.min_block is None
    with pytest.raises(UserError, match=r"1 mistake in the settings\n  mask\.kind: Input should be 'block' or 'random'"):
        parse(MimRecipe, {**RECIPE, "mask": {"kind": "rand", "min_block": 4}}, "r.yaml")
    data = {"source": "shard", "root": "/a", "shuffle_gb": 1.0}  # told by the registry of sources, with the nearest name
    assert parse(MimRecipe, {**RECIPE, "data": data}, "r.yaml").data.shuffle_gb == 1.0


def test_parts_of_a_mixture_have_kinds_of_their_own() -> None:
    parts = [{"source": "shards", "root": "/a", "shuffle_gb": 2.0}, {"source": "folder", "root": "/b"}]
    tree = {**RECIPE, "data": {"mixture": parts, "held_out": {"source": "scenes", "root": "/c"}}}
    with pytest.raises(UserError) as caught:
        resolve(MimRecipe, tree, ["data.mixture.1.bad_shards=skip", "data.mixture.0.source=list"], "r.yaml")
    lines = str(caught.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == ["data.mixture.1.bad_shards", "data.held_out.root"]
    with pytest.raises(UserError, match=r"1 mistake in the settings\n  data: data\.shuffle_gb belongs to one source"):
        parse(MimRecipe, {**RECIPE, "data": {"mixture": parts, "shuffle_gb": 1.0}}, "r.yaml")


def test_sections_in_mappings_are_looked_at() -> None:
    class Inner(Settings):
        kind: Literal["a", "b"] = "a"
        depth: Annotated[int, For("kind", "b")] = 1

    class Outer(Settings):
        named: dict[str, Inner] | None = None

    with pytest.raises(UserError, match=r"named\.x\.depth: is for named\.x\.kind=b, and named\.x\.kind is a"):
        parse(Outer, {"named": {"x": {"depth": 2}, "y": {"kind": "b", "depth": 2}}}, "r.yaml")


# ---- pipelines


def pipeline(folder: Path, **more: Any) -> str:
    """A masked stage and a classifier, with settings of the pipeline."""
    mim = {**RECIPE, "teacher": {"name": "ViT-B-16", "weights": "openai"}, "mask": {"min_block": 4, "exact": True}}
    (folder / "mim.yaml").write_text(yaml.safe_dump(mim))
    (folder / "classify.yaml").write_text(yaml.safe_dump({name: RECIPE[name] for name in ("student", "data", "run", "optim")}))
    stages = [{"name": "first", "program": "mim", "recipe": str(folder / "mim.yaml"), "settings": more.pop("first", {})},
              {"name": "second", "program": "classify", "recipe": str(folder / "classify.yaml"), "init_from": "first"}]
    (folder / "p.yaml").write_text(yaml.safe_dump({"stages": stages} | more))
    return str(folder / "p.yaml")


def test_each_layer_of_a_pipeline_changes_kinds_of_those_before_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The recipe, settings for all stages, a stage's own, the command line; and the plain command says the same."""
    path = pipeline(tmp_path, settings={"data.source": "shards", "data.shuffle_gb": 2.0, "mask.min_aspect": 0.5},
                    first={"mask.kind": "random", "teacher.kind": "timm"})
    _, (first, second) = plan(path, ["data.source=scenes"], tmp_path / "out")
    assert isinstance(first.recipe, MimRecipe)
    assert isinstance(second.recipe, ClassifyRecipe)
    assert first.recipe.mask == MaskSettings(kind="random")
    assert (first.recipe.data.source, second.recipe.data.source) == ("scenes", "scenes")
    assert (first.recipe.teacher.kind, first.recipe.teacher.weights) == ("timm", None)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert "mask.kind=random leaves out mask.exact, mask.min_block, mask.min_aspect, set for mask.kind=block" in told[0]
    assert "data.source=scenes leaves out data.root, data.shuffle_gb, set for data.source=shards" in told[0]
    for stage, file, model in ((first, "mim", MimRecipe), (second, "classify", ClassifyRecipe)):
        tree = yaml.safe_load((tmp_path / f"{file}.yaml").read_text())
        assert resolve(model, tree, stage.assignments, "r.yaml") == stage.recipe
    with pytest.raises(UserError, match=r"stage first .*\n  mask\.exact: is for mask\.kind=block"):
        plan(path, ["first.mask.exact=false"], tmp_path / "out")


def test_a_stage_that_becomes_the_teacher_needs_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(pipeline(tmp_path))
    tree = yaml.safe_load(path.read_text())
    tree["stages"] = [{"name": "clip", "program": "clip", "recipe": "configs/clip/scenes_teacher.yaml"},
                      tree["stages"][0] | {"teacher": "clip"}]
    path.write_text(yaml.safe_dump(tree))
    _, (_, second) = plan(str(path), [], tmp_path / "out")
    assert isinstance(second.recipe, MimRecipe)
    assert second.recipe.teacher == TargetTeacherSettings(kind="stage", name=str(tmp_path / "out" / "clip"))
    assert "teacher.kind=stage leaves out teacher.weights, set for teacher.kind=open_clip" in capsys.readouterr().err


# ---- lists


def test_entries_of_lists_are_overridden_by_number() -> None:
    tree = {"data": {"mixture": [{"weight": 1.0, "scenes": {"size": 8}}, {"weight": 2.0}], "templates": ["a {}", "b {}"]}}
    changed = override(tree, ["data.mixture.0.weight=3", "data.mixture.0.scenes.size=16", "data.templates.1=c {}",
                              "data.mixture.1={weight: 4}"])
    assert changed == {"data": {"mixture": [{"weight": 3, "scenes": {"size": 16}}, {"weight": 4}], "templates": ["a {}", "c {}"]}}
    assert tree["data"]["mixture"][0]["weight"] == 1.0  # type: ignore[index]


@pytest.mark.parametrize(
    ("assignment", "message"),
    [("a.b.2.c=1", "a.b.2.c: a.b has no entry 2; it is a list of 2, numbered 0 to 1"), ("a.b.x=1", "a.b has no entry x"),
     ("a.b.-1=1", "a.b has no entry -1"), ("a.e.0=1", "a.e has no entry 0; it is a list of 0"), ("a.b.1.c=1", "1 is a value")],
)
def test_a_wrong_entry_is_one_line(assignment: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        override({"a": {"b": [{}, 5], "e": []}}, [assignment])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


GIVEN = [
    ("init_from", "x.pt", {"hand_over": {"norm": "copy"}}),
    ("view.jitter", [0.4, 0.4, 0.4, 0.1], {"view": {"jitter_prob": 0.5}}),
    ("run.ema_decay", 0.999, {"run": RECIPE["run"] | {"ema_warmup": False}}),
]
"""(setting, a value of it, settings that have an effect only beside it)."""


@pytest.mark.parametrize(("setting", "value", "own"), GIVEN, ids=lambda part: part if isinstance(part, str) else "")
def test_settings_that_need_another_one(
    capsys: pytest.CaptureFixture[str], setting: str, value: Any, own: dict[str, Any]
) -> None:
    """Refused without it by path; taken away with it by an override, in one line; and not among the settings that are written."""
    tree = deepcopy(RECIPE) | own
    (section, inner), *_ = own.items()
    name = section if section == "hand_over" else f"{section}.{list(inner)[-1]}"
    with pytest.raises(UserError, match=rf"{name}: has no effect without {setting}; leave it out, or set {setting}"):
        resolve(MimRecipe, tree, [], "r.yaml")
    put(tree, setting, value)
    made = resolve(MimRecipe, tree, [], "r.yaml")
    assert resolve(MimRecipe, as_tree(made), [], "resolved.yaml") == made
    assert capsys.readouterr().err == ""
    without = resolve(MimRecipe, tree, [f"{setting}=null"], "r.yaml")
    assert capsys.readouterr().err == f"r.yaml: {setting}=null leaves out {name}, set for {setting}={value}\n"
    assert name not in str([item.path for item in dependents(MimRecipe, as_tree(without))])
