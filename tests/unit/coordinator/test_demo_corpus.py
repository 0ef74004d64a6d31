"""The corpus of a demo: prepared once, and a start that failed spoils no later one."""

from __future__ import annotations

import pytest

from coordinator.demo import text
from coordinator.domain.errors import FleetError, StartError
from coordinator.service.corpus import prepare_corpus


def folder_of_text(path, word):
    """Write a folder of text that is enough for a corpus."""
    path.mkdir()
    for number in range(8):
        lines = f"{word} {number}\n" + f"some {word} to learn from\n" * 40
        (path / f"{number}.txt").write_text(lines)
    return path


@pytest.fixture
def state(tmp_path):
    (tmp_path / "state").mkdir()
    return tmp_path / "state"


def prepare(state, source):
    return text.prepare(state / "corpus", source)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_corpus_is_prepared_once_and_known_by_its_source(state, tmp_path):
    books = folder_of_text(tmp_path / "books", "books")

    first = prepare(state, books)

    assert prepare(state, books) == first
    assert names(state) == ["corpus", "corpus-source"]
    assert (state / "corpus/0.txt").resolve() == books / "0.txt"
    with pytest.raises(StartError, match="books, not on docstrings"):
        prepare(state, None)


def test_after_a_folder_without_text_another_will_do(state, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FleetError, match="no text"):
        prepare(state, tmp_path / "empty")
    assert names(state) == []

    prepare(state, folder_of_text(tmp_path / "books", "books"))

    assert (state / "corpus-source").read_text() == str(tmp_path / "books")


def test_after_an_interruption_another_folder_gets_its_own_name(
    state, tmp_path, monkeypatch
):
    def interrupted(*_arguments, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(text, "prepare_corpus", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(state, folder_of_text(tmp_path / "books", "books"))
    verse = folder_of_text(tmp_path / "verse", "verse")

    prepare(state, verse)

    assert (state / "corpus-source").read_text() == str(verse)
    assert (state / "corpus/0.txt").read_text().startswith("verse")


def test_what_a_killed_start_left_is_not_used(state, tmp_path):
    left = folder_of_text(state / ".corpus-new", "left")
    assert prepare_corpus(left, text.Recipe(vocab_size=300), now=1.0)
    (state / "corpus-source").write_text("left")
    books = folder_of_text(tmp_path / "books", "books")

    prepare(state, books)

    assert names(state) == ["corpus", "corpus-source"]
    assert (state / "corpus/0.txt").read_text().startswith("books")


def test_a_corpus_folder_that_is_not_prepared_is_not_touched(state, tmp_path):
    mine = folder_of_text(state / "corpus", "mine")
    before = names(mine)

    with pytest.raises(StartError, match="holds no prepared corpus: remove it"):
        prepare(state, folder_of_text(tmp_path / "books", "books"))

    assert names(mine) == before
