"""Changes places of the product one at a time and runs the tests that should notice: proof that the suite still bites.

    python -m tools.mutants [--seed 0] [--drawn 18] [--minutes 4] [--only 3 7] [--list] [--out runs/mutants.json]

Twelve places are named here, three of each kind of fault (sign, off by one, dropped seed, skipped flush to the disk); the others
are drawn over the syntax trees of all rooms. Each change is made in a copy of the tree beside this one, where the tests of its
room and of the programs run until one fails; without the change that one must pass. Exit code 0: at most 4 of 30 survived; 1:
more did; 2: a test fails without a change.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).parent.parent
PRODUCT = ("eva_mim", "pretrain", "finetune")
PROGRAMS = ("tests/programs", "tests/run")
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
LARGEST_SHARE_OF_SURVIVORS = 4 / 30


class Mutant(NamedTuple):
    """One change of one file."""

    kind: str
    file: str
    line: int
    old: str
    new: str
    source: str
    """The whole file with the change."""

    def __str__(self) -> str:
        return f"{self.kind:<12} {self.file}:{self.line}  {_short(self.old)}  ->  {_short(self.new)}"


NAMED = [
    ("sign", "eva_mim/tasks/objectives.py", "RowLosses(-cosine", "RowLosses(cosine"),
    ("sign", "eva_mim/optim/schedule.py", "0.5 * (start - end)", "0.5 * (end - start)"),
    ("sign", "eva_mim/tasks/contrastive.py", "return -F.logsigmoid(", "return F.logsigmoid("),
    ("off by one", "eva_mim/optim/schedule.py", "(step + 1) / warmup", "step / warmup"),
    ("off by one", "eva_mim/data/sampler.py", "range(first, last):", "range(first + 1, last + 1):"),
    ("off by one", "eva_mim/teachers/frozen.py", "return settings.layer % blocks", "return (settings.layer + 1) % blocks"),
    ("dropped seed", "eva_mim/data/sampler.py", 'derive(self.seed, "order", epoch)', 'derive(0, "order", epoch)'),
    ("dropped seed", "eva_mim/data/preparation.py", "derive(seed, purpose", "derive(0, purpose"),
    ("dropped seed", "eva_mim/run/loop.py", 'seed_all(derive(self.run.seed, "step", self.step, rank()))', "pass"),
    ("no flush", "eva_mim/core/files.py", "        fsync(temporary)\n", ""),
    ("no flush", "eva_mim/run/checkpoints.py", "    flush_folder(temporary)\n", ""),
    ("no flush", "eva_mim/data/store/write.py", "        flush_folder(parent)\n", "        pass\n"),
]
"""(kind, file, old text, new text); the old text is in the file once."""


EQUIVALENT = {
    ("eva_mim/core/contracts.py", "tensor.to(device)"): "a copy from memory that is not pinned waits either way",
    ("eva_mim/evaluate/contrastive.py", "F.normalize(torch.stack(torch.chunk(torch.cat(parts), len(names))).mean(1))"):
        "the last dimension of two is the default",
    ("eva_mim/weights/resize.py", "count <= 4"): "a table of relative positions has an odd number of places a side",
}
"""(file, new text) of changes without an effect, and why: drawn, they are left out."""


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def named() -> list[Mutant]:
    """Returns the changes of `NAMED`. Raises ValueError for text that its file does not have exactly once."""
    found = []
    for kind, file, old, new in NAMED:
        source = (REPOSITORY / file).read_text()
        if source.count(old) != 1:
            raise ValueError(f"{file} has {source.count(old)} times: {old}")
        line = source[: source.index(old)].count("\n") + 1
        found.append(Mutant(kind, file, line, old, new, source.replace(old, new)))
    return found


OTHER = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot,
    ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div,
    ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.And: ast.Or, ast.Or: ast.And,
}
"""Operator -> the one that takes its place."""
SPEAKS = ("say", "write", "print", "add_argument", "join", "UserError", "ValueError", "phase", "status")
"""Calls whose arguments are words for people."""


SAME_RESULT = ("strict", "non_blocking", "device")
"""Keywords without which a result is the same: a check of lengths that are equal, waiting for a copy, and the device of a new
tensor where there is only one."""


def candidates(tree: ast.AST) -> Iterator[tuple[str, ast.AST, ast.AST]]:
    """(kind, node, what takes its place) of every comparison, operator, constant, keyword argument and statement that decides a
    number, a file or a refusal: no annotations, docstrings or words for people."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(tree, (ast.FunctionDef, ast.AsyncFunctionDef)) and child in (tree.args, tree.returns, *tree.decorator_list):
            continue
        if isinstance(child, (ast.JoinedStr, ast.arguments)) or (isinstance(tree, ast.AnnAssign) and child is tree.annotation):
            continue
        if isinstance(child, ast.Call):
            name = child.func.attr if isinstance(child.func, ast.Attribute) else getattr(child.func, "id", "")
            if name in SPEAKS:
                continue
            for number, keyword in enumerate(child.keywords):
                if keyword.arg is not None and keyword.arg not in SAME_RESULT:
                    rest = [*child.keywords[:number], *child.keywords[number + 1 :]]
                    yield "argument", child, ast.Call(child.func, child.args, rest)
        if isinstance(child, ast.Compare) and len(child.ops) == 1:
            yield "comparison", child, ast.Compare(child.left, [OTHER[type(child.ops[0])]()], child.comparators)
        if isinstance(child, ast.BinOp) and type(child.op) in OTHER and not isinstance(child.left, ast.Constant | ast.JoinedStr):
            yield "operator", child, ast.BinOp(child.left, OTHER[type(child.op)](), child.right)
        if isinstance(child, ast.BoolOp):
            yield "operator", child, ast.BoolOp(OTHER[type(child.op)](), child.values)
        same = isinstance(tree, ast.keyword) and tree.arg in (*SAME_RESULT, "seed")  # another fixed seed is as good a draw
        if isinstance(child, ast.Constant) and not isinstance(tree, ast.Expr) and not same:
            if isinstance(child.value, bool):
                yield "constant", child, ast.Constant(not child.value)
            elif isinstance(child.value, int | float):
                yield "constant", child, ast.Constant(child.value + 1)
        calls = isinstance(child, ast.Expr) and isinstance(child.value, ast.Call)
        raises = isinstance(child, ast.If) and not child.orelse and isinstance(child.body[-1], ast.Raise)
        if calls or raises or isinstance(child, ast.AugAssign):
            yield "deleted", child, ast.Pass()
        yield from candidates(child)


def _functions(tree: ast.Module) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("__repr"):
            yield node


def room(file: str) -> str:
    """Returns the room of a file: `core`, `data`, ..., `programs` for pretrain/ and finetune/."""
    first, second, *_ = Path(file).parts
    return second if first == "eva_mim" else "programs"


def drawn(seed: int, count: int) -> list[Mutant]:
    """Returns changes drawn with a seed: the rooms take turns in a random order, then a file by its lines, then a place."""
    order = random.Random(seed)
    files: dict[str, list[Path]] = {}
    for package in PRODUCT:
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            files.setdefault(room(str(path.relative_to(REPOSITORY))), []).append(path)
    files = {name: paths for name, paths in files.items() if not name.endswith(".py")}
    rooms, found = sorted(files), []
    order.shuffle(rooms)
    for name in cycle(rooms):
        if len(found) == count:
            return found
        paths = files[name]
        path = order.choices(paths, [len(path.read_text().splitlines()) for path in paths])[0]
        source = path.read_text()
        # A function inside a function is walked twice; one place is one candidate.
        places = {
            (node.lineno, node.col_offset, kind, ast.unparse(new)): (kind, node, new)  # type: ignore[attr-defined]
            for function in _functions(ast.parse(source)) for kind, node, new in candidates(function)
        }
        if not places:
            continue
        kind, node, new = places[order.choice(sorted(places))]
        text = ast.get_source_segment(source, node)
        assert text is not None
        changed = ast.unparse(new)
        file = str(path.relative_to(REPOSITORY))
        if (file, changed) in EQUIVALENT:
            continue
        found.append(Mutant(kind, file, node.lineno, text, changed, _replaced(source, node, changed)))
    raise AssertionError("no rooms")


def _replaced(source: str, node: ast.AST, text: str) -> str:
    lines = source.splitlines(keepends=True)
    first, last = node.lineno - 1, node.end_lineno - 1  # type: ignore[attr-defined]
    head = lines[first].encode()[: node.col_offset].decode()  # type: ignore[attr-defined]
    tail = lines[last].encode()[node.end_col_offset :].decode()  # type: ignore[attr-defined]
    keeps = isinstance(node, ast.expr)
    return "".join([*lines[:first], head + (f"({text})" if keeps else text) + tail, *lines[last + 1 :]])


def tests_of(file: str) -> list[tuple[tuple[str, ...], str]]:
    """Returns (test files, markers) of the tests of a file's room and of the programs, in the order in which they run: the files
    that name the changed module, then the room's others, then the programs'; of each the fast tests first."""
    own = REPOSITORY / "tests" / room(file)
    folders = dict.fromkeys([*([own] if own.is_dir() else []), *(REPOSITORY / folder for folder in PROGRAMS)])
    found = {folder: [str(path.relative_to(REPOSITORY)) for path in sorted(folder.rglob("test_*.py"))] for folder in folders}
    module = ".".join(Path(file).with_suffix("").parts).removesuffix(".__init__")
    package, _, name = module.rpartition(".")
    names = re.compile(rf"\b({re.escape(module)}|from {re.escape(package)} import ([\w, ]+, )?{name})\b(?!\.)")
    near = [path for paths in found.values() for path in paths if names.search((REPOSITORY / path).read_text())]
    groups = [near, *([path for path in paths if path not in near] for paths in found.values())]
    return [(tuple(group), markers) for group in groups if group for markers in ("not slow and not long", "slow and not long")]


def _environment(tree: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}


def caught(mutant: Mutant, tree: Path, minutes: float) -> tuple[str, float]:
    """Returns the first test that fails in a copy of the tree with the change ("" if none did in time), and the seconds taken.
    Raises RuntimeError if that test fails without the change too."""
    path, started = tree / mutant.file, time.monotonic()
    original = path.read_text()
    path.write_text(mutant.source)
    try:
        by, seconds = _first_failure(mutant, tree, minutes), time.monotonic() - started
    finally:
        path.write_text(original)
    again = [*PYTEST, "-m", "not long", by]
    if "::" in by and subprocess.run(again, cwd=tree, env=_environment(tree), capture_output=True).returncode:
        raise RuntimeError(f"{by} fails without a change")
    return by, seconds


def _first_failure(mutant: Mutant, tree: Path, minutes: float) -> str:
    ends = time.monotonic() + minutes * 60
    for tests, markers in tests_of(mutant.file):
        if (left := ends - time.monotonic()) <= 1:
            break
        line = [*PYTEST, "-x", "-n", "2", "--dist", "loadfile", "--tb=no", "-m", markers, *tests]
        start: dict[str, Any] = {"cwd": tree, "env": _environment(tree), "stdout": subprocess.PIPE, "start_new_session": True}
        with subprocess.Popen(line, text=True, **start) as run:
            try:
                said = run.communicate(timeout=left)[0]
            except subprocess.TimeoutExpired:
                os.killpg(run.pid, 9)
                break
        if run.returncode == 1 or run.returncode == 2:
            failed = [text for text in said.splitlines() if text.startswith(("FAILED ", "ERROR "))]
            return failed[0].split(" - ")[0].partition(" ")[2] if failed else said.strip()[-200:]
    return ""


def main() -> int:
    """Try every change; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drawn", type=int, default=18, help="places drawn beside the twelve named ones")
    parser.add_argument("--minutes", type=float, default=4.0, help="for the tests of one change")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the list")
    parser.add_argument("--list", action="store_true", help="print the changes, run nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/mutants.json"))
    options = parser.parse_args()
    mutants = list(enumerate([*named(), *drawn(options.seed, options.drawn)], 1))
    mutants = [(number, mutant) for number, mutant in mutants if options.only is None or number in options.only]
    if options.list:
        sys.stdout.writelines(f"{number:>2} {mutant}\n" for number, mutant in mutants)
        return 0
    tree = Path(tempfile.mkdtemp(prefix="mutants-", dir=REPOSITORY.parent))  # beside this one, where the tests find ../shared
    rows, survivors = [], 0
    try:
        listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        kept = subprocess.run(listing, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout
        for name in filter(None, kept.split("\0")):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, tree / name)
        # A copy whose tests cannot even be collected would "catch" every change.
        subprocess.run([*PYTEST, "--collect-only", "-m", "not long", "tests"], cwd=tree, env=_environment(tree), check=True,
                       stdout=subprocess.DEVNULL)
        for number, mutant in mutants:
            by, seconds = caught(mutant, tree, options.minutes)
            survivors += not by
            rows.append({"number": number, **mutant._asdict(), "caught_by": by, "seconds": round(seconds)})
            del rows[-1]["source"]
            sys.stdout.write(f"{number:>2} {mutant}\n     {f'caught by {by}' if by else 'SURVIVED'} ({seconds:.0f} s)\n")
            sys.stdout.flush()
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(rows, indent=1))
    except RuntimeError as error:
        sys.stdout.write(f"error: {error}; mend it first\n")
        return 2
    finally:
        shutil.rmtree(tree)
    sys.stdout.write(f"{len(rows) - survivors} of {len(rows)} caught\n")
    return int(survivors > LARGEST_SHARE_OF_SURVIVORS * len(rows))


if __name__ == "__main__":
    sys.exit(main())
