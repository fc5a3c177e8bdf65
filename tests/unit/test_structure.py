"""How the code is laid out: test modules share nothing but `tests.support`; functions and modules stay short."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEST_FOLDERS = ("unit", "model", "demo", "gpu", "lmms", "vllm")
LONGEST_FUNCTION, LONGEST_MODULE = 60, 400


def modules_under(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported_names(source: str, package: tuple[str, ...]) -> Iterator[str]:
    """Full names that a module of ``package`` imports anywhere; of ``from a import b`` that is ``a.b``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            module = (*above, *([node.module] if node.module else ()))
            yield from (".".join((*module, alias.name)) for alias in node.names)


def in_test_folders(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(tuple(f"tests.{folder}." for folder in TEST_FOLDERS))]


def long_functions(source: str) -> list[str]:
    """Functions and methods of more lines than `LONGEST_FUNCTION`, decorators not counted."""
    return [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= LONGEST_FUNCTION
    ]


def test_no_module_imports_from_a_test_module() -> None:
    found = {}
    for path in modules_under("tests"):
        place = path.relative_to(ROOT)
        names = imported_names(path.read_text(encoding="utf-8"), place.parts[:-1])
        if wrong := in_test_folders(names):
            found[place.as_posix()] = wrong
    assert found == {}


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("from tests.unit.test_solvers import shape_of", ["tests.unit.test_solvers.shape_of"]),
        ("from tests.gpu import test_cuda as cuda", ["tests.gpu.test_cuda"]),
        ("import os, tests.model.test_merge", ["tests.model.test_merge"]),
        ("def f():\n    from tests.demo.test_scenes import draw", ["tests.demo.test_scenes.draw"]),
        ("from .test_merge import made", ["tests.model.test_merge.made"]),
        ("from . import test_merge", ["tests.model.test_merge"]),
        ("from ..lmms.test_lmms_eval import run", ["tests.lmms.test_lmms_eval.run"]),
        ("from tests.support.schedules import schedule_for", []),
        ("from ..support import greedy", []),
        ("import tests.conftest", []),
    ],
)
def test_imports_of_every_form_are_seen(line: str, wrong: list[str]) -> None:
    assert in_test_folders(imported_names(line, ("tests", "model"))) == wrong


def test_functions_and_modules_are_short() -> None:
    paths = modules_under("pruning_runtime", "schedule_finder", "scripts")
    assert len(paths) > 100
    sources = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    assert {place: found for place, source in sources.items() if (found := long_functions(source))} == {}
    lines = {place: len(source.splitlines()) for place, source in sources.items()}
    assert {place: count for place, count in lines.items() if count > LONGEST_MODULE} == {}


@pytest.mark.parametrize(("lines", "found"), [(60, []), (61, ["method: 61 lines"])])
def test_long_methods_are_seen(lines: int, found: list[str]) -> None:
    source = "class A:\n    @property\n    def method(self):\n" + "        pass\n" * (lines - 1)
    assert long_functions(source) == found
