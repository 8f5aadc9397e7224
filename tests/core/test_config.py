"""Settings: every mistake at once with its path, overrides, hostile files; and all recipes and pipelines of the project."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from eva_mim.core.errors import UserError
from eva_mim.core.recipe_files import MAX_RECIPE_BYTES, find_recipe, read_yaml
from eva_mim.core.registry import PROGRAMS, lookup
from eva_mim.core.settings import Settings, as_tree, differences, digest, override, parse, setting_names
from eva_mim.data import DataSettings
from eva_mim.data.view_settings import ViewSettings
from eva_mim.optim import OptimSettings
from eva_mim.pipeline.plan import plan
from eva_mim.run.recipe import Recipe
from finetune.probe import StageRecipe as ProbeRecipe
from pretrain.clip import StageRecipe as ClipRecipe
from pretrain.mim_recipe import StageRecipe as MimRecipe
from tests.conftest import REPOSITORY

CONFIGS = REPOSITORY / "configs"
RECIPES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name in PROGRAMS)
PIPELINES = sorted((CONFIGS / "pipelines").glob("*.yaml"))


def minimal(**more: Any) -> dict[str, Any]:
    """The least that a mim recipe needs."""
    return {
        "teacher": {"name": "x"},
        "student": {"name": "vit_nano_patch4_32"},
        "data": {"source": "scenes"},
        "run": {"epochs": 1, "global_batch": 8},
        "optim": {"lr": 1e-3},
    } | more


def mistakes(model: type[Settings], tree: dict[str, Any]) -> list[str]:
    """The lines of the one error, without its heading."""
    with pytest.raises(UserError) as caught:
        parse(model, tree, "r.yaml")
    heading, *lines = str(caught.value).splitlines()
    assert heading.startswith(f"r.yaml: {len(lines)} mistake")
    return [line.strip() for line in lines]


# ---- mistakes


def test_all_mistakes_come_at_once_with_their_paths_and_nearest_names() -> None:
    tree = minimal(
        run={"epochs": 0, "global_bach": 8, "precision": "fp8"},
        data={"source": "scenes", "scenes": {"sise": 3, "labels": "medium"}},
        student={"name": "x", "drop_path": 1.5},
        optim={"lr": 1e-3, "min_lr": 1.0},
        maks={},
    )
    lines = mistakes(MimRecipe, tree)
    expected = {
        "run.epochs": "greater than or equal to 1 (got 0)",
        "run.global_batch": "must be given",
        "run.global_bach": "no such setting; did you mean run.global_batch?",
        "run.precision": "'fp32', 'bf16' or 'fp16' (got 'fp8')",
        "data.scenes.sise": "no such setting; did you mean data.scenes.size?",
        "data.scenes.labels": "(got 'medium')",
        "student.drop_path": "less than 1 (got 1.5)",
        "optim": "optim.min_lr=1.0 is above optim.lr=0.001",
        "maks": "no such setting; did you mean mask?",
    }
    found = {line.partition(": ")[0]: line.partition(": ")[2] for line in lines}
    assert found.keys() == expected.keys()
    for path, text in expected.items():
        assert text in found[path]


def test_cross_field_rules_say_what_to_set() -> None:
    (line,) = mistakes(MimRecipe, minimal(run={"epochs": 1, "global_batch": 8, "zero_stage": 2}))
    assert "run.zero_stage=2 needs run.engine=deepspeed" in line
    (line,) = mistakes(MimRecipe, minimal(data={"source": "folder"}))
    assert "data.root must be given" in line
    (line,) = mistakes(MimRecipe, minimal(data={"source": "scenes", "templates": ["no name"]}))
    assert "'no name'" in line
    clip = {name: value for name, value in minimal().items() if name != "teacher"}
    (line,) = mistakes(ClipRecipe, clip | {"contrastive": {"kind": "siglip"}})
    assert "contrastive.kind=siglip needs a logit bias; set student.init_logit_bias" in line
    (line,) = mistakes(ProbeRecipe, clip)
    assert "init_from must be given" in line


@pytest.mark.parametrize(
    ("model", "tree"),
    [
        (OptimSettings, {"lr": float("nan")}),
        (OptimSettings, {"lr": float("inf")}),
        (OptimSettings, {"lr": 1.0, "betas": [2.0, -1.0]}),
        (ViewSettings, {"crop_ratio": [0.0, -1.0]}),
        (ViewSettings, {"crop_scale": [1.0, 0.2]}),
        (DataSettings, {"source": "scenes", "templates": []}),
    ],
    ids=str,
)
def test_values_that_cannot_work_fail_before_anything_is_built(model: type[Settings], tree: dict[str, Any]) -> None:
    wrong = [name for name in tree if name not in ("lr", "source")] or ["lr"]
    assert all(wrong[0] in line for line in mistakes(model, tree))


def test_settings_are_frozen() -> None:
    recipe = parse(MimRecipe, minimal(), "r.yaml")
    with pytest.raises(ValidationError, match="frozen"):
        recipe.run.epochs = 5  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        recipe.init_from = "x"  # type: ignore[misc]
    assert recipe.run.epochs == 1


def test_setting_names_are_the_dotted_paths_of_the_tree() -> None:
    def paths(tree: dict[str, Any], prefix: str = "") -> set[str]:
        below = (paths(value, f"{prefix}{name}.") for name, value in tree.items() if isinstance(value, dict))
        return {prefix + name for name in tree}.union(*below)

    null = tuple(f"teacher.{section}." for section in ("objective", "head", "normaliser"))
    empty = ("data.held_out.", "data.segmentation.", "data.video.", "evaluate.segmentation.", "teachers.*.", "groups.*.",
             "student.windows.")
    outside = (*empty, *null)  # null and empty where they are not given
    own = {name for name in setting_names(MimRecipe) if not name.startswith(outside)}
    assert own == paths(parse(MimRecipe, minimal(), "r.yaml").model_dump(mode="json"))


# ---- overrides


def test_a_section_keeps_the_defaults_of_its_place() -> None:
    """A view's seed alone leaves the crops of a clip stage as they are, which are not those of every stage."""
    tree = {"data": {"source": "scenes"}, "student": {"name": "vit_nano_patch4_32"}, "run": {"epochs": 1, "global_batch": 2},
            "optim": {"lr": 1.0}}
    alone, seeded, flipped = (parse(ClipRecipe, tree | more, "recipe").view
                              for more in ({}, {"view": {"seed": 1}}, {"view": {"flip": 0.25}}))
    assert (alone.crop_scale, alone.flip) == (seeded.crop_scale, seeded.flip) == ((0.9, 1.0), 0.0)
    assert (flipped.crop_scale, flipped.flip) == ((0.9, 1.0), 0.25)


def test_overrides_are_yaml_values_at_dotted_names() -> None:
    tree = {"run": {"epochs": 1}, "view": None}
    changed = override(
        tree,
        ["run.epochs=7", "run.device=cpu", "view.crop_scale=[0.5, 1.0]", "data.scenes.size=16", "a=b=c", "optim.lr=1.0e-4",
         "init_from=", "data.limit=null"],
    )
    assert changed == {
        "run": {"epochs": 7, "device": "cpu"},
        "view": {"crop_scale": [0.5, 1.0]},
        "data": {"scenes": {"size": 16}, "limit": None},
        "a": "b=c",
        "optim": {"lr": 1e-4},
        "init_from": None,
    }
    assert tree == {"run": {"epochs": 1}, "view": None}


@pytest.mark.parametrize(
    ("assignment", "message"),
    [("run.epochs", "not an override"), ("=3", "not an override"), ("run.=3", "not an override"), ("a=[1", "not readable"),
     ("run.epochs.x=3", "epochs is a value"), ("a=2020-13-45", "not readable")],
)
def test_a_bad_override_is_the_users_mistake(assignment: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        override({"run": {"epochs": 1}}, [assignment])


def test_digest_ignores_the_order_of_keys_and_differences_name_paths() -> None:
    one, other = {"a": {"b": 1, "c": [2]}, "d": None}, {"d": None, "a": {"c": [2], "b": 1}}
    assert digest(one) == digest(other)
    assert digest(one) != digest({"a": {"b": 1, "c": [3]}, "d": None})
    assert differences(one, {"a": {"b": 1, "c": [3]}, "e": 4}) == ["a.c: [2] -> [3]", "e: None -> 4"]


# ---- files


def test_recipes_are_found_by_path_and_by_their_place_in_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    wanted = (CONFIGS / "mim" / "scenes.yaml").read_bytes()
    for name in ("configs/mim/scenes.yaml", "mim/scenes.yaml"):
        assert find_recipe(name).read_bytes() == wanted
    (tmp_path / "mim").mkdir()
    (tmp_path / "mim" / "scenes.yaml").write_text("mine: 1")
    assert read_yaml("mim/scenes.yaml") == {"mine": 1}
    with pytest.raises(UserError, match=r"did you mean configs/mim/scenes\.yaml\?"):
        find_recipe("configs/mim/scene.yaml")


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{below}'] * 10)}]\n" for below, name in zip("abcde", "bcdef", strict=True)
)
"""300 bytes that stand for a million values: aliases of aliases."""


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.system ['true']",
        "a: !!python/name:os.system",
        "a: [1",
        "- a list",
        "just text",
        "",
        "a: " + "[" * 20_000,
        "a: \0",
        "a: 2020-13-45",
        "a: " + "1" * 5000,
        "a: &a {b: *a}",
        BOMB,
    ],
    ids=["apply", "name", "broken", "list", "text", "empty", "deep", "nul", "no such day", "long number", "loop", "bomb"],
)
def test_hostile_and_broken_files_are_the_users_mistake(tmp_path: Path, text: str) -> None:
    """Read as a program does it: the file, then the (empty) list of overrides."""
    path = tmp_path / "r.yaml"
    path.write_text(text)
    started = time.perf_counter()
    with pytest.raises(UserError):
        override(read_yaml(path), [])
    assert time.perf_counter() - started < 60  # a bomb takes hours


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("#" * (MAX_RECIPE_BYTES + 1))
    with pytest.raises(UserError, match="too large"):
        read_yaml(path)
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match="not readable"):
        read_yaml(path)


# ---- the project's recipes and pipelines


def test_there_are_recipes_and_pipelines() -> None:
    assert {path.parent.name for path in RECIPES} == set(PROGRAMS)
    assert PIPELINES


def only(values: Any, like: Any) -> Any:
    """The part of a resolved tree that `like` names."""
    if isinstance(like, list):
        return [only(value, below) for value, below in zip(values, like, strict=True)]
    return {name: only(values[name], below) for name, below in like.items()} if isinstance(like, dict) else values


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_recipe_parses_and_survives_being_written(path: Path) -> None:
    model: type[Recipe] = lookup(PROGRAMS, path.parent.name, "program").recipe
    tree = read_yaml(path)
    recipe = parse(model, tree, str(path))
    resolved = as_tree(recipe)
    assert parse(model, yaml.safe_load(yaml.safe_dump(resolved)), "resolved.yaml") == recipe
    assert only(resolved, tree) == tree  # what the file says is what the run gets


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.name)
def test_every_pipeline_plans(path: Path, tmp_path: Path) -> None:
    """Each stage has its program's recipe, and what it builds on is the folder of an earlier stage."""
    file, planned = plan(str(path), ["run.seed=5"], tmp_path)
    assert [stage.entry.name for stage in planned] == [stage["name"] for stage in yaml.safe_load(path.read_text())["stages"]]
    assert {name for group in file.compare for name in group} <= {stage.entry.name for stage in planned}
    earlier: set[Path] = set()
    for stage in planned:
        assert stage.recipe.run.seed == 5
        if stage.entry.text_from:  # a folder, and no name of open_clip's
            (tmp_path / stage.entry.text_from).mkdir(exist_ok=True)
        parents = set(stage.recipe.parents().values())
        named = {tmp_path / name for name in (stage.entry.init_from, stage.entry.teacher, stage.entry.text_from) if name}
        assert {parent for parent in parents if tmp_path in parent.parents} == named
        assert named <= earlier
        earlier.add(stage.out)


def write_pipeline(folder: Path, **settings: Any) -> str:
    """Two stages: a clip teacher and its student."""
    recipes = {"clip": {name: value for name, value in minimal().items() if name != "teacher"}, "mim": minimal()}
    for name, tree in recipes.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    stages = [{"name": "first", "program": "clip", "recipe": str(folder / "clip.yaml")},
              {"name": "second", "program": "mim", "recipe": str(folder / "mim.yaml"), "teacher": "first", "init_from": "first"}]
    (folder / "p.yaml").write_text(yaml.safe_dump({"stages": stages} | settings))
    return str(folder / "p.yaml")


def test_overrides_reach_one_stage_or_all_that_have_the_section(tmp_path: Path) -> None:
    path = write_pipeline(tmp_path, settings={"run.epochs": 3, "mask.ratio": 0.2})
    _, (first, second) = plan(path, ["second.run.epochs=9", "run.global_batch=6", "teacher.image_size=64"], tmp_path / "out")
    assert (first.recipe.run.epochs, second.recipe.run.epochs) == (3, 9)
    assert (first.recipe.run.global_batch, second.recipe.run.global_batch) == (6, 6)
    assert isinstance(second.recipe, MimRecipe)
    assert (second.recipe.mask.ratio, second.recipe.teacher.image_size) == (0.2, 64)
    assert (second.recipe.teacher.kind, second.recipe.teacher.name) == ("stage", str(tmp_path / "out" / "first"))


def test_a_pipelines_mistakes_come_together(tmp_path: Path) -> None:
    path = write_pipeline(tmp_path)
    with pytest.raises(UserError) as caught:
        plan(path, ["first.run.epoch=1", "second.optim.lr=-1"], tmp_path)
    for text in ("stage first", "did you mean run.epochs?", "stage second", "optim.lr"):
        assert text in str(caught.value)
    with pytest.raises(UserError, match="neither a stage"):
        plan(path, ["third.run.epochs=1"], tmp_path)
    with pytest.raises(UserError, match="no such stage"):
        plan(write_pipeline(tmp_path, compare=[["first", "ghost"]]), [], tmp_path)


@pytest.mark.parametrize("name", ["plain", "run #1", "a: b", "[x]", "it's", "2024-13-45", "&a"])
def test_any_folder_name_survives_planning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Stages pass their folders on as overrides, which are read as YAML."""
    path = write_pipeline(tmp_path)
    monkeypatch.chdir(tmp_path)
    _, (first, second) = plan(path, [], Path(name))
    assert isinstance(second.recipe, MimRecipe)
    assert second.recipe.init_from == second.recipe.teacher.name == str(first.out) == f"{name}/first"


def test_random_damage_never_escapes_as_another_error(tmp_path: Path) -> None:
    """Recipes with a few letters changed: each parses or is a UserError."""
    rng, refused = random.Random(0), 0
    text = (CONFIGS / "mim" / "scenes.yaml").read_text()
    for _ in range(300):
        letters = list(text)
        for _ in range(rng.randint(1, 4)):
            letters[rng.randrange(len(letters))] = rng.choice("{}[]:#&*!%@`\"' \n\tx0-")
        (tmp_path / "r.yaml").write_text("".join(letters))
        try:
            parse(MimRecipe, override(read_yaml(tmp_path / "r.yaml"), []), "r.yaml")
        except UserError:
            refused += 1
    assert 100 < refused < 300
