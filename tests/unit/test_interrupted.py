"""Ctrl-C while a program still imports itself, which takes a second."""

from __future__ import annotations

import importlib
import sys
from importlib.abc import MetaPathFinder

import pytest


class Interrupted(MetaPathFinder):
    """Where a module is looked for, somebody presses Ctrl-C."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, name: str, path: object, _target: object = None) -> None:
        if name == self.name:
            raise KeyboardInterrupt


@pytest.mark.parametrize("package", ["coordinator", "worker"])
def test_a_program_that_is_interrupted_as_it_starts_ends_without_a_word(
    monkeypatch, capsys, package
) -> None:
    program = importlib.import_module(f"{package}.__main__")
    line = f"{package}.cli"
    monkeypatch.delitem(sys.modules, line, raising=False)
    monkeypatch.delattr(sys.modules[package], "cli", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupted(line), *sys.meta_path])

    assert program.main() == 130
    assert capsys.readouterr() == ("", "")
