"""The demo's text: docstrings, each once, the same on every run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from coordinator.service.demo_text import write_demo_text

ROOT = Path(__file__).parents[3]
LONG = "Words that fill a module up." * 10


def write_module(path, source):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8")


def test_docstrings_are_written_clean_and_in_source_order(tmp_path):
    write_module(
        tmp_path / "lib/package/module.py",
        f'''"""First. {LONG}"""
if True:
    class Thing:
        """Second.

        Below:
            Indented.
        """
        async def act(self):
            """Third."""
def last():
    """Fourth."""
    "not a docstring"
''',
    )

    written = write_demo_text(tmp_path / "out", source=tmp_path / "lib")

    text = (tmp_path / "out/package.module.txt").read_text(encoding="utf-8")
    assert text == (
        f"First. {LONG}\n\nSecond.\n\nBelow:\n    Indented.\n\nThird.\n\nFourth.\n\n"
    )
    assert (written.num_modules, written.num_bytes) == (1, len(text))


def test_a_docstring_given_twice_is_written_once(tmp_path):
    write_module(tmp_path / "lib/a.py", f'"""A {LONG}"""\ndef f():\n    """Same."""\n')
    write_module(tmp_path / "lib/b.py", f'"""B {LONG}"""\ndef f():\n    """Same."""\n')

    write_demo_text(tmp_path / "out", source=tmp_path / "lib")

    assert (tmp_path / "out/a.txt").read_text().count("Same.") == 1
    assert (tmp_path / "out/b.txt").read_text().count("Same.") == 0


def test_tests_packages_and_short_modules_are_left_out(tmp_path):
    for name in ("test/t.py", "site-packages/s.py", "x/tests/t.py", "idlelib/i.py"):
        write_module(tmp_path / "lib" / name, f'"""{name} {LONG}"""\n')
    write_module(tmp_path / "lib/short.py", '"""Short."""\n')
    write_module(tmp_path / "lib/kept.py", f'"""Kept. {LONG}"""\n')

    write_demo_text(tmp_path / "out", source=tmp_path / "lib")

    assert [path.name for path in (tmp_path / "out").iterdir()] == ["kept.txt"]


def test_modules_are_parsed_and_never_run(tmp_path):
    write_module(tmp_path / "lib/m.py", f'"""{LONG}"""\nraise SystemExit("ran")\n')

    assert write_demo_text(tmp_path / "out", source=tmp_path / "lib").num_modules == 1


def test_a_docstring_with_a_lone_surrogate_is_still_written_as_utf8(tmp_path):
    write_module(tmp_path / "lib/m.py", f'"""Half \\ud800 pair. {LONG}"""\n')

    write_demo_text(tmp_path / "out", source=tmp_path / "lib")

    assert (tmp_path / "out/m.txt").read_bytes().startswith(b"Half ? pair.")


def test_a_full_folder_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")

    with pytest.raises(FileExistsError, match="not empty"):
        write_demo_text(tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_source_without_docstrings_is_refused_and_leaves_nothing(tmp_path):
    (tmp_path / "lib").mkdir()

    with pytest.raises(FileNotFoundError, match="no documented Python module"):
        write_demo_text(tmp_path / "out", source=tmp_path / "lib")

    assert [path.name for path in tmp_path.iterdir()] == ["lib"]


@pytest.mark.slow
def test_this_interpreter_gives_a_megabyte_and_always_the_same(tmp_path):
    before = set(sys.modules)
    code = (
        "import sys; from pathlib import Path; "
        "from coordinator.service.demo_text import write_demo_text; "
        "print(write_demo_text(Path(sys.argv[1])))"
    )

    # Beside this one, in a process whose hashes are others.
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "second"],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "1"},
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        first = write_demo_text(tmp_path / "first")
        second, _ = other.communicate()

    assert second == f"{first}\n"
    assert first.num_bytes > 1_000_000
    assert first.num_modules > 200
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert "argparse.txt" in names
    assert names == sorted(path.name for path in (tmp_path / "second").iterdir())
    for name in names:
        one, two = (tmp_path / folder / name for folder in ("first", "second"))
        assert one.read_bytes() == two.read_bytes()
    assert "turtle" not in set(sys.modules) - before
