"""What every entry of the registry owes: the contracts of `eva_mim.core.contracts`, checked on tiny real parts."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from eva_mim.core import registry
from eva_mim.core.contracts import Engine, Features, Sample, Source, Teacher
from eva_mim.core.errors import UserError
from eva_mim.core.files import write_json
from eva_mim.core.registry import ENGINES, PROGRAMS, SOURCES, TEACHERS, Command, lookup, nearest
from eva_mim.data import DataSettings
from eva_mim.data.source_settings import ColumnSettings, SceneSettings
from eva_mim.run.recipe import Recipe
from eva_mim.students import ClipSettings, TextSettings
from eva_mim.students.clip import ClipStudent
from eva_mim.teachers import TeacherSettings, build_teacher
from tests.conftest import make_folder, make_shards

TABLES = {name: table for name, table in vars(registry).items() if name.isupper() and isinstance(table, dict)}


@pytest.mark.parametrize(("table", "name"), [(table, name) for table, entries in TABLES.items() for name in entries])
def test_every_name_stands_for_something_that_exists(table: str, name: str) -> None:
    found = lookup(TABLES[table], name, "x")
    entry = TABLES[table][name]
    if isinstance(entry, Command):
        module, _, attribute = entry.place.partition(":")
        assert found.build.__module__ == module
        assert attribute == "STAGE"
    else:
        module, _, attribute = entry.partition(":")
        assert (found.__module__, found.__name__) == (module, attribute) if attribute else found.__name__ == module


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"run.engine: 'lokal' is not known; did you mean local\? known: local, deepspeed"):
        lookup(ENGINES, "lokal", "run.engine")


def test_near_names_end_a_message() -> None:
    names = ["mask", "masks", "mast", "optim"]
    assert nearest("maks", names) == "; did you mean masks?"
    assert nearest("maks", names, count=3) == "; did you mean masks, mast or mask?"
    assert nearest("maks", names, count=3, cutoff=0.8) == "; did you mean masks?"
    assert nearest("zzz", names) == nearest("zzz", []) == ""


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_has_the_methods_of_its_contract(name: str) -> None:
    """Names and parameters."""
    engine = lookup(ENGINES, name, "x")
    for method, declared in vars(Engine).items():
        if callable(declared) and not method.startswith("_"):
            assert list(inspect.signature(getattr(engine, method)).parameters) == list(inspect.signature(declared).parameters)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_has_a_recipe_a_builder_and_a_main(name: str) -> None:
    program = lookup(PROGRAMS, name, "x")
    assert issubclass(program.recipe, Recipe)
    assert program.name == name
    assert list(inspect.signature(program.build).parameters) == ["recipe", "device"]
    with pytest.raises(SystemExit) as left:
        program.main(["--help"])
    assert left.value.code == 0


# ---- sources


def scenes(root: Path) -> DataSettings:
    return DataSettings(source="scenes", scenes=SceneSettings(size=16, train=5, val=4))


def folders(root: Path) -> DataSettings:
    make_folder(root / "train", {"a": 3, "b": 2})
    make_folder(root / "val", {"a": 2, "b": 2})
    return DataSettings(source="folder", root=root, train="train", val="val")


def shards(root: Path) -> DataSettings:
    make_shards(root, "train-0.tar", count=5)
    make_shards(root, "val-0.tar.gz", first=5, count=4)
    (root / "classes.txt").write_text("x\ny\nz\n")
    return DataSettings(source="shards", root=root, train="train-*", val="val-*", classes="classes.txt")


def lists(root: Path) -> DataSettings:
    make_folder(root, {"": 9})
    for name, numbers in (("train", range(5)), ("val", range(5, 9))):
        rows = [f"{number:05d}.png,{'xyz'[number % 3]}" for number in numbers]
        (root / f"{name}.csv").write_text("\n".join(["image,kind", *rows]))
    return DataSettings(source="list", root=root, train="train.csv", val="val.csv", columns=ColumnSettings(label="kind"))


MADE_SOURCES: dict[str, Callable[[Path], DataSettings]] = {
    "scenes": scenes, "folder": folders, "shards": shards, "list": lists,
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_keeps_its_contract(name: str, tmp_path: Path) -> None:
    settings = MADE_SOURCES[name](tmp_path)
    opener = lookup(SOURCES, name, "data.source")
    train, val = opener(settings, "train"), opener(settings, "val")
    assert (len(train), len(val)) == (5, 4)
    assert train.fingerprint != val.fingerprint
    assert opener(settings, "train").fingerprint == train.fingerprint
    assert train.classes == val.classes
    assert len({train.key(index) for index in range(5)}) == 5
    workers_copy: Source = pickle.loads(pickle.dumps(train))  # a spawned loader process gets it like this
    for index in (3, 0, 3):
        sample = train.read(index)
        assert isinstance(sample, Sample)
        assert sample.key == train.key(index)
        assert isinstance(sample.image, Image.Image)
        assert sample.image.mode == "RGB"
        assert sample.label in range(len(train.classes))
        again = workers_copy.read(index)
        assert (again.image.tobytes(), *again[2:]) == (sample.image.tobytes(), *sample[2:])


# ---- teachers


@pytest.fixture(scope="module")
def clip_stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a finished clip stage leaves for open_clip, written by hand."""
    torch.manual_seed(0)
    text = TextSettings(width=16, layers=1, heads=2, context_length=8)
    student = ClipStudent(ClipSettings(name="convnet_nano_32", embed_dim=12, text=text))
    with torch.no_grad():
        for _ in range(20):  # norm statistics as after some training
            student.train().model.visual(torch.randn(4, 3, 32, 32))
    folder = tmp_path_factory.mktemp("stage")
    save_file({n: v.contiguous() for n, v in student.model.state_dict().items()}, folder / "open_clip_model.safetensors")
    write_json(folder / "open_clip_config.json", student.open_clip_config())
    return folder


MADE_TEACHERS = {
    "timm": TeacherSettings(kind="timm", name="vit_nano_patch4_32"),
    "stage": TeacherSettings(kind="stage", name=""),
    "open_clip": TeacherSettings(kind="open_clip", name="ViT-S-32-alt", image_size=64),
}


@pytest.fixture(params=sorted(TEACHERS.keys() - {"pixels"}))  # it has no weights: tests/teachers/test_pixels.py
def teacher(request: pytest.FixtureRequest, clip_stage: Path) -> Teacher:
    """A tiny teacher of every kind."""
    settings = MADE_TEACHERS[request.param]
    torch.manual_seed(1)
    return build_teacher(settings.model_copy(update={"name": settings.name or str(clip_stage)}))


def network(teacher: Teacher) -> nn.Module:
    found = [value for value in vars(teacher).values() if isinstance(value, nn.Module)]
    assert len(found) == 1
    return found[0]


def pixels(teacher: Teacher, count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    size = teacher.image_size
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def test_a_teacher_states_its_grid_and_width_truly(teacher: Teacher) -> None:
    features = teacher(pixels(teacher))
    assert isinstance(features, Features)
    assert features.grid == teacher.grid
    assert features.spatial.shape == (3, teacher.grid[0] * teacher.grid[1], teacher.width)
    assert features.summary.shape == (3, teacher.width)
    assert features.spatial.isfinite().all()
    assert features.spatial.flatten(0, 1).std(0).mean() > 1e-3  # patches differ


def test_patches_come_row_by_row(teacher: Teacher) -> None:
    """Noise in the top right corner changes the top right patch most."""
    images = pixels(teacher, 1)
    changed = images.clone()
    rows, columns = teacher.grid
    side = teacher.image_size // columns
    changed[:, :, :side, -side:] = 255 - changed[:, :, :side, -side:]
    change = (teacher(changed).spatial - teacher(images).spatial).norm(dim=-1)[0].reshape(rows, columns)
    assert divmod(int(change.argmax()), columns) == (0, columns - 1)


def test_a_teacher_is_frozen_and_nothing_changes_it(teacher: Teacher) -> None:
    inner, before = network(teacher), teacher.fingerprint()
    state = copy.deepcopy(inner.state_dict())
    with torch.enable_grad():
        first = teacher(pixels(teacher))
        assert not first.spatial.requires_grad
        assert not first.summary.requires_grad
    assert not any(parameter.requires_grad for parameter in inner.parameters())
    assert not any(module.training for module in inner.modules())
    nn.ModuleDict({"holder": nn.Linear(2, 2)}).train()
    alone = torch.cat([teacher(image[None]).spatial for image in pixels(teacher)])
    assert torch.allclose(alone, first.spatial, atol=2e-5)  # no statistics of the batch
    assert torch.equal(teacher(pixels(teacher)).spatial, first.spatial)
    assert all(torch.equal(value, state[name]) for name, value in inner.state_dict().items())
    assert teacher.fingerprint() == before
    with torch.no_grad():
        next(iter(inner.parameters())).mul_(1.001)
    assert teacher.fingerprint() != before


def test_a_teacher_is_no_part_of_a_module_that_holds_it(teacher: Teacher) -> None:
    holder = nn.Module()
    holder.teacher = teacher  # type: ignore[assignment]
    assert not list(holder.parameters())
    assert not holder.state_dict()


def test_a_teacher_normalises_with_its_own_mean_and_std(teacher: Teacher) -> None:
    """The first layer sees (x / 255 - mean) / std, by hand."""
    images, seen = pixels(teacher), []
    inner = network(teacher)
    first = next(module for module in inner.modules() if isinstance(module, nn.Conv2d))
    handle = first.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    teacher(images)
    handle.remove()
    expected = torch.stack(
        [(images[:, c].double() / 255 - teacher.mean[c]) / teacher.std[c] for c in range(3)], dim=1
    )
    assert torch.allclose(seen[0].double(), expected, atol=2e-6)


def test_the_stage_teacher_has_the_stages_weights_and_pixels(clip_stage: Path) -> None:
    teacher = build_teacher(TeacherSettings(kind="stage", name=str(clip_stage)))
    weights = load_file(clip_stage / "open_clip_model.safetensors")
    inner = network(teacher).state_dict()
    assert all(torch.equal(value, weights[f"visual.{name}"]) for name, value in inner.items())
    assert (teacher.mean, teacher.std) == ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    assert (teacher.image_size, teacher.grid, teacher.width) == (32, (8, 8), 12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (TeacherSettings(kind="tim", name="x"), "did you mean timm"),
        (TeacherSettings(kind="timm", name="no_such_model"), "no_such_model"),
        (TeacherSettings(kind="timm", name="vit_nano_patch4_32", weights="/no/such/file"), "does not exist"),
        (TeacherSettings(kind="open_clip", name="ViT-Z"), "not among open_clip"),
        (TeacherSettings(kind="open_clip", name="ViT-B-32", weights="/no/such/file"), "ViT-B-32"),
        (TeacherSettings(kind="stage", name="/no/such/folder"), "finished clip stage"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_an_unusable_teacher_is_the_users_mistake(settings: TeacherSettings, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_teacher(settings)


@pytest.mark.parametrize("damage", ["weights cut", "weights missing", "config cut"])
def test_a_damaged_stage_is_the_users_mistake(clip_stage: Path, tmp_path: Path, damage: str) -> None:
    for name, kind in (("open_clip_config.json", "config"), ("open_clip_model.safetensors", "weights")):
        content = (clip_stage / name).read_bytes()
        if damage != f"{kind} missing":
            (tmp_path / name).write_bytes(content[:100] if damage == f"{kind} cut" else content)
    with pytest.raises(UserError, match=str(tmp_path)):
        build_teacher(TeacherSettings(kind="stage", name=str(tmp_path)))
