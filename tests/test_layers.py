"""The map of the project, guarded: who may import whom, how long files and functions are, what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from configparser import ConfigParser
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, make_folder
from tests.tiny import environment

ROOMS = [
    "core", "trunks", "data", "optim", "weights.files", "weights.names", "teachers", "students", "weights", "targets", "tasks",
    "engine",
    "convert", "evaluate", "run", "pipeline", "commands", "cli", "pretrain", "finetune",
]
"""The rooms, lowest first: a file imports only from its own room and from those before it. `weights.files` and `weights.names`
stand apart from the rest of `weights`, so that one reader of checkpoints serves teachers and students as well."""
ROOT = {"eva_mim"}
"""Nothing but the version; every room may ask for it."""
LIBRARIES = {
    "deepspeed": {"eva_mim.engine.deepspeed", "eva_mim.engine.sharded_state"},
    "open_clip": {
        "eva_mim.students.clip", "eva_mim.teachers.open_clip", "eva_mim.convert.architecture",
        "eva_mim.data.prompts", "eva_mim.evaluate.zeroshot",
    },
}
FILES = sorted(path for package in ("eva_mim", "pretrain", "finetune") for path in (REPOSITORY / package).rglob("*.py"))
LIGHT = [
    "eva_mim.cli", "eva_mim.pipeline.run", "eva_mim.run.program", "eva_mim.run.recipe", "eva_mim.core.registry",
    "eva_mim.core.settings", "eva_mim.core.errors", "eva_mim.core.report", "eva_mim.core.run_folder", "eva_mim.trunks",
    "eva_mim.data",
    "eva_mim.engine", "eva_mim.tasks", "eva_mim.students", "eva_mim.teachers", "eva_mim.optim", "eva_mim.weights",
    "pretrain.mim", "pretrain.clip", "finetune.classify", "finetune.probe", "eva_mim.commands.teacher",
    "eva_mim.commands.evaluate",
    "eva_mim.commands.replay", "eva_mim.data.class_lists", "eva_mim.commands.labels", "eva_mim.commands.inspect",
    "eva_mim.weights.files.read", "eva_mim.commands.convert", "eva_mim.commands.data", "eva_mim.commands.bench",
    "eva_mim.commands.pipeline", "eva_mim.commands.sweep", "eva_mim.run.state",
]
"""What is imported before a recipe is checked: a mistyped setting is answered at once."""
MAX_FILE, MAX_FUNCTION = 330, 70


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


MODULES = {module_name(path): path for path in FILES}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever in the file: `from a import b` is a.b where that is a module."""
    found: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in inner}
    return found


def room(module: str) -> int:
    """Place of a module's room in ROOMS."""
    inside = module.removeprefix("eva_mim.")
    found = [name for name in ROOMS if inside == name or inside.startswith(f"{name}.")]
    assert found, f"{module} stands in no room; add one to ROOMS, or put the file into one"
    return ROOMS.index(max(found, key=len))


def ours(module: str) -> bool:
    return module.partition(".")[0] in ("eva_mim", "pretrain", "finetune")


def test_imports_are_seen() -> None:
    """The parser of this file finds what is there."""
    assert "eva_mim.run.checkpoints" in imports(MODULES["eva_mim.run.loop"])  # from eva_mim.run import checkpoints
    assert "deepspeed" in imports(MODULES["eva_mim.engine.deepspeed"])  # inside a function
    assert "eva_mim.run.stage" in imports(MODULES["pretrain.mim"])  # for type checking
    assert len(FILES) > 40


def test_a_file_imports_only_from_its_own_room_and_those_before_it() -> None:
    wrong = [
        f"{name} -> {other}"
        for name, path in MODULES.items()
        for other in imports(path)
        if ours(other) and name not in ROOT and other not in ROOT and room(other) > room(name)
    ]
    assert not wrong


def test_nothing_lies_outside_the_rooms() -> None:
    assert {path.name for path in (REPOSITORY / "eva_mim").iterdir() if path.is_file()} == {"__init__.py", "cli.py", "py.typed"}
    assert all(room(name) >= 0 for name in MODULES if name not in ROOT)


def test_the_installed_package_is_whole() -> None:
    """Packages are named one by one; `configs` lies elsewhere."""
    setup = ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    named = setup["options"]["packages"].split()
    there = {module_name(path) for path in FILES if path.name == "__init__.py"}
    assert sorted(named) == sorted(there | {"eva_mim.configs"})


def test_the_architectures_need_timm_alone() -> None:
    """They are what a user imports who opens a result without this project's other parts."""
    needed = {name.partition(".")[0] for name in imports(MODULES["eva_mim.trunks.small"])}
    assert needed == {"__future__", "collections", "functools", "typing", "timm", "torch"}


def test_the_library_imports_no_program() -> None:
    wrong = [
        f"{name} -> {other}"
        for name, path in MODULES.items()
        if name.startswith("eva_mim")
        for other in imports(path)
        if other.partition(".")[0] in ("pretrain", "finetune", "tests", "tools")
    ]
    assert not wrong


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_heavy_library_has_its_own_files(library: str) -> None:
    found = {name for name, path in MODULES.items() if any(i.partition(".")[0] == library for i in imports(path))}
    assert found == LIBRARIES[library]


def test_no_module_imports_itself_in_a_circle() -> None:
    """Imports at the top of files only; those inside functions may look back."""
    def top(path: Path) -> set[str]:
        body = ast.Module([node for node in tree(path).body if isinstance(node, (ast.Import, ast.ImportFrom))], [])
        found: set[str] = set()
        for node in body.body:
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        return found & MODULES.keys()

    graph = {name: top(path) - {name} for name, path in MODULES.items()}
    graph = {name: {o for o in others if not name.startswith(f"{o}.")} for name, others in graph.items()}
    while graph:
        free = {name for name, others in graph.items() if not others & graph.keys()}
        assert free, f"a circle among {sorted(graph)}"
        graph = {name: others for name, others in graph.items() if name not in free}


def test_files_and_functions_stay_short() -> None:
    long = [f"{path}: {lines} lines" for path in FILES if (lines := len(path.read_text().splitlines())) > MAX_FILE]
    for path in FILES:
        for node in ast.walk(tree(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno is not None
                if node.end_lineno - node.lineno + 1 > MAX_FUNCTION:
                    long.append(f"{path}: {node.name} has {node.end_lineno - node.lineno + 1} lines")
    assert not long


def test_the_library_does_not_print() -> None:
    wrong = [
        f"{path}:{node.lineno}"
        for path in FILES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not wrong


def test_every_public_thing_says_what_it_is() -> None:
    """Modules, classes and functions without a leading underscore have a docstring (protocol methods and dunders aside)."""
    silent = []
    for name, path in MODULES.items():
        if name == "eva_mim.core.contracts":
            continue
        if not ast.get_docstring(tree(path)):
            silent.append(name)
        for node in tree(path).body:
            public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
            if public and not ast.get_docstring(node) and not any(
                isinstance(base, ast.Name) and base.id == "NamedTuple" for base in getattr(node, "bases", [])
            ):
                silent.append(f"{name}.{node.name}")
    assert not silent


def test_settings_are_checked_before_torch_is_loaded() -> None:
    code = (
        "import sys\n"
        f"for name in {LIGHT!r}:\n"
        "    __import__(name)\n"
        "    heavy = {'torch', 'timm', 'open_clip', 'deepspeed', 'torchvision', 'PIL', 'numpy'} & sys.modules.keys()\n"
        "    assert not heavy, (name, heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stderr[-500:]


def test_a_mistyped_setting_is_answered_without_torch() -> None:
    """The whole command, from its arguments to its exit code."""
    code = (
        "import sys\n"
        "from eva_mim.cli import main\n"
        "code = main(['mim', 'configs/mim/scenes.yaml', 'run.epoch=3', '--out', '/nonexistent/run'])\n"
        "assert 'torch' not in sys.modules\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 2, done.stderr[-500:]
    assert "run.epoch: no such setting; did you mean run.epochs?" in done.stderr
    assert "Traceback" not in done.stderr


def test_commands_on_data_need_no_torch(tmp_path: Path) -> None:
    """Nor do the processes that they start, which would each load it."""
    make_folder(tmp_path / "data", {"ant": 4, "bee": 4})
    code = (
        "import sys\n"
        "from eva_mim.cli import main\n"
        "for words in (['index'], ['inspect', '--out', 'a.png'], ['verify', '--out', 'b.json'], ['stats'],\n"
        "              ['pack', '--out', 'c']):\n"
        f"    assert main(['data', words[0], {str(tmp_path / 'data')!r}, *words[1:]]) == 0\n"
        "    assert 'torch' not in sys.modules, words\n"
        "import eva_mim.data.sources.scenes, eva_mim.data.sources.shards, eva_mim.data.sources.lists\n"
        "assert 'torch' not in sys.modules\n"
    )
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, check=False, env=environment())
    assert done.returncode == 0, done.stderr[-500:]
