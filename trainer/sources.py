"""The files of a task that its program and metric need: a release carries them, serving loads no others."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from trainer.errors import ReleaseError


def sources(folder: Path, starts: Iterable[Path]) -> list[Path]:
    """`starts` and every module of the folder that they import, directly or by way of another.

    Found by reading, not by running, so imports inside of functions count as well. Modules that are
    named only at run time (`importlib.import_module(name)`) are not found.

    Args:
        folder: the task's; absolute imports are looked up in it.

    Returns:
        Paths below `folder`, sorted.

    Raises:
        ReleaseError: a file lies outside of the folder, or is no Python.
    """
    found: set[Path] = set()
    waiting = [_inside(folder, file) for file in starts]
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting += [_inside(folder, other) for other in _imported(folder, file)]
    return sorted(found)


def _inside(folder: Path, file: Path) -> Path:
    path = Path(os.path.normpath(file))
    if not path.resolve().is_relative_to(folder.resolve()) or not path.is_relative_to(folder):
        raise ReleaseError(
            f"{file} lies outside the task folder {folder}; move it in, a release holds its source"
        )
    return path


def _imported(folder: Path, file: Path) -> Iterator[Path]:
    """The folder's files that a file names in its import statements, their packages with them."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError) as error:
        raise ReleaseError(f"{file} is no Python ({error}); mend it, a program imports it") from error
    package = file.relative_to(folder).parent.parts
    for node in ast.walk(tree):
        for name in _names(node, package):
            if name and name[0] not in sys.stdlib_module_names:
                yield from _files(folder, name)


def _names(node: ast.AST, package: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Dotted names that an import statement may stand for: `from a import b` means a, and a.b if that is a module."""
    if isinstance(node, ast.Import):
        return [tuple(alias.name.split(".")) for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    above = package[: len(package) + 1 - node.level] if node.level else ()
    base = (*above, *(node.module.split(".") if node.module else ()))
    return [base, *((*base, alias.name) for alias in node.names)]


def _files(folder: Path, name: tuple[str, ...]) -> Iterator[Path]:
    for size in range(1, len(name) + 1):
        path = folder.joinpath(*name[:size])
        for file in (path.with_name(f"{path.name}.py"), path / "__init__.py"):
            if file.is_file():
                yield file
