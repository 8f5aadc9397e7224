"""Recipe files: where they lie, and the mappings in them, read strictly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from eva_mim.core.errors import UserError
from eva_mim.core.registry import nearest

MAX_RECIPE_BYTES = 1_000_000
"""A recipe is written by hand; a larger file is a mistake (or an attack on the YAML reader)."""
MAX_RECIPE_VALUES = 10_000
"""Most values of a recipe, after aliases are expanded; the largest recipe here has about 100."""
MERGE = "tag:yaml.org,2002:merge"
"""Tag of the key "<<", which takes the keys of another mapping in; keys written beside it take precedence."""


def find_recipe(name: str | Path) -> Path:
    """Returns the path of a recipe, given by path or by its place under `configs/` in the installed package. Raises UserError."""
    path = Path(name)
    if path.is_file():
        return path
    inside = Path(*path.parts[1:]) if path.parts[:1] == ("configs",) else path
    package = Path(__file__).parent.parent
    for home in (package / "configs", package.parent / "configs"):
        if not path.is_absolute() and (home / inside).is_file():
            return home / inside
    known = sorted(
        f"configs/{file.relative_to(home)}"
        for home in (package / "configs", package.parent / "configs")
        for file in home.rglob("*.yaml")
    )
    raise UserError(f"recipe {name} does not exist{nearest(str(name), known, cutoff=0.4)}")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads the mapping in a YAML file. Raises UserError for a missing, huge, broken or non-mapping file."""
    path = find_recipe(path)
    if path.stat().st_size > MAX_RECIPE_BYTES:
        raise UserError(f"{path}: {path.stat().st_size} bytes is too large for a recipe")
    try:
        tree = read_text(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as YAML: {error}") from None
    _refuse_bombs(tree, path)
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected settings (name: value), found {type(tree).__name__}")
    return tree


def read_text(text: str) -> Any:
    """Returns the value in a YAML text. Raises yaml.YAMLError, ValueError, RecursionError."""
    return yaml.load(text, _Strict)


class _Strict(yaml.SafeLoader):
    """YAML's safe loader, which also refuses what would be read otherwise than meant: a key twice in one mapping, and a key that
    is no text (`on:`, `1:`)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Returns the mapping. Raises yaml.YAMLError."""
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            if key.tag == MERGE:
                continue
            name, line = self.construct_object(key, deep=True), key.start_mark.line + 1
            if not isinstance(name, str):
                raise yaml.YAMLError(f"line {line}: the key {key.value} is read as {name!r}, no text; write it in quotes")
            if name in lines:
                raise yaml.YAMLError(f"line {line}: {name} stands in line {lines[name]} already")
            lines[name] = line
        return super().construct_mapping(node, deep)


def _refuse_bombs(tree: Any, path: Path) -> None:
    """Raises UserError for too many values: with YAML aliases a few lines can expand to billions of values, or to a loop."""
    count, waiting = 0, [tree]
    while waiting:
        value, count = waiting.pop(), count + 1
        if count > MAX_RECIPE_VALUES:
            raise UserError(f"{path}: more than {MAX_RECIPE_VALUES} values")
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
