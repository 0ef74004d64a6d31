"""A corpus that every machine already has: the docstrings of the standard library.

Real English about programming, some megabytes of it, so that the demo needs no
download. Modules are parsed, never imported. The same interpreter always gives
the same files.
"""

from __future__ import annotations

import ast
import os
import shutil
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

#: Modules with less text than this are left out.
MIN_MODULE_BYTES: Final = 200

# Installed packages, tests, programs that are no library, and what was generated.
_SKIPPED_FOLDERS: Final = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "idle_test",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)

_Documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoText:
    """What was written: one file for each module."""

    num_modules: int
    #: UTF-8 bytes in all files.
    num_bytes: int


def write_demo_text(target: Path, *, source: Path | None = None) -> DemoText:
    """Write the docstrings of the modules below `source` into the folder `target`.

    One text file for each module, docstrings in source order with a blank line
    between; a docstring that another module already gave is left out. `source` is
    the standard library of this interpreter by default. The folder appears whole.

    Raises FileExistsError when `target` holds something already, and
    FileNotFoundError when `source` has no documented module.
    """
    source = source or Path(sysconfig.get_paths()["stdlib"])
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"folder for the demo text is not empty: {target}")
    fresh = target.with_name(f".{target.name}-new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    sizes = []
    for name, text in _module_texts(source):
        (fresh / f"{name}.txt").write_bytes(text)
        sizes.append(len(text))
    if not sizes:
        fresh.rmdir()
        raise FileNotFoundError(f"no documented Python module in {source}")
    fresh.replace(target)
    return DemoText(num_modules=len(sizes), num_bytes=sum(sizes))


def _module_texts(source: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the dotted name and the UTF-8 text of each module, sorted by path."""
    seen: set[str] = set()
    for path in _modules(source):
        docstrings = []
        for docstring in _docstrings(_parse(path)):
            if docstring not in seen:
                seen.add(docstring)
                docstrings.append(docstring)
        # A docstring may spell a lone surrogate, which UTF-8 cannot hold.
        text = "".join(f"{doc}\n\n" for doc in docstrings).encode(errors="replace")
        if len(text) >= MIN_MODULE_BYTES:
            yield ".".join(path.relative_to(source).with_suffix("").parts), text


def _modules(source: Path) -> list[Path]:
    found = []
    for folder, subfolders, names in os.walk(source):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found)


def _parse(path: Path) -> ast.Module:
    with warnings.catch_warnings():
        # Old escapes in somebody's string literal are no concern of ours.
        warnings.simplefilter("ignore")
        return ast.parse(path.read_bytes(), filename=str(path))


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Yield the docstrings of a node and of all below it, in source order."""
    if isinstance(node, _Documented):
        docstring = ast.get_docstring(node, clean=True)
        if docstring:
            yield docstring
    for child in ast.iter_child_nodes(node):
        yield from _docstrings(child)
