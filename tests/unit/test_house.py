"""The rules of the house that no linter knows: sizes, who may be async, who may read the environment."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "skialith"
MODULES = sorted(PACKAGE.rglob("*.py"))
LONGEST_FUNCTION = 70
LONGEST_MODULE = 450
ASYNC_HOMES = ("wal/", "sidecar/", "aio.py", "awaiting.py", "langchain.py")

each_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def test_there_is_something_to_check() -> None:
    assert len(MODULES) > 20


@each_module
def test_a_module_opens_with_a_sentence(path: Path) -> None:
    docstring = ast.get_docstring(parsed(path)) or ""
    assert docstring.split("\n\n")[0].rstrip().endswith((".", ";")), f"{path} does not say in one sentence what it is"


@each_module
def test_sizes(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST_MODULE, f"{path} has {lines} lines"
    for function in functions(parsed(path)):
        length = (function.end_lineno or function.lineno) - function.lineno + 1
        assert length <= LONGEST_FUNCTION, f"{path}: {function.name} has {length} lines"


@each_module
def test_async_lives_in_its_homes(path: Path) -> None:
    name = path.relative_to(PACKAGE).as_posix()
    if name.startswith(ASYNC_HOMES):
        return
    found = [function.name for function in functions(parsed(path)) if isinstance(function, ast.AsyncFunctionDef)]
    assert not found, f"{path}: async def {found[0]}"


@each_module
def test_only_config_reads_the_environment(path: Path) -> None:
    if path.name == "config.py":
        return
    used = [
        f"{path}:{node.lineno}"
        for node in ast.walk(parsed(path))
        if (isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb"))
        or (isinstance(node, ast.alias) and node.name in ("environ", "getenv", "environb"))
    ]
    assert not used, f"the environment is read outside config.py: {used}"


@each_module
def test_only_modules_are_imported_from_the_package_itself(path: Path) -> None:
    """What import-linter cannot see: ``from .. import name`` is fine for a module, else a way round the layers."""
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom) and (
            node.module == "skialith" or (not node.module and node.level == depth)
        ):
            for alias in node.names:
                there = [*PACKAGE.glob(f"{alias.name}.py*"), *PACKAGE.glob(f"{alias.name}/__init__.py")]
                assert there, f"{path}:{node.lineno} imports {alias.name}, which is no module"
        if isinstance(node, ast.Import):
            assert not any(alias.name == "skialith" for alias in node.names), f"{path}:{node.lineno} imports everything"
