"""The corpus of a running coordinator stays, whoever asks for another."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path

import numpy as np
import pytest

from bitnet_ext.layout import num_params
from coordinator.domain.errors import StartError
from coordinator.service.adopting import adopt_corpus
from coordinator.service.corpus import Recipe, prepare_corpus
from coordinator.service.corpus_lock import CorpusInUseError, in_use, replacing
from coordinator.service.starting import RunSettings
from tests.unit.coordinator.fleets import PLAN, World, write_corpus


def adopt(world):
    return adopt_corpus(
        world.fleet,
        RunSettings(preset="tiny", seed=3, plan=PLAN),
        lambda shape, _seed: np.zeros(num_params(shape), dtype=np.float32),
    )


def tokenize(world):
    """Prepare the corpus anew, as one does who has another data folder or none."""
    for number in range(8):
        text = f"document {number}\n" + "some words to learn from\n" * 40
        (world.fleet.corpus / f"{number}.txt").write_text(text)
    recipe = Recipe(vocab_size=300, held_out_bytes=1000)
    return prepare_corpus(world.fleet.corpus, recipe, now=1.0)


def contents(folder: Path):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_corpus_of_a_running_coordinator_is_not_replaced(world: World):
    adopt(world)
    before = contents(world.fleet.corpus / "tokenized")

    with pytest.raises(CorpusInUseError, match="in use by a coordinator"):
        tokenize(world)

    assert contents(world.fleet.corpus / "tokenized") == before


def test_after_its_coordinator_has_ended_it_can_be_replaced(world: World):
    adopt(world)
    world.fleet.close()

    assert tokenize(world) != world.fleet.manifest


def test_several_coordinators_can_use_one_corpus(world: World):
    adopt(world)

    with in_use(world.fleet.corpus / "tokenized"), pytest.raises(CorpusInUseError):
        tokenize(world)


def test_a_corpus_that_is_being_replaced_is_not_begun_with(world: World):
    with (
        replacing(world.fleet.corpus / "tokenized"),
        pytest.raises(StartError, match="is being prepared anew"),
    ):
        adopt(world)

    assert adopt(world)


def test_a_corpus_that_was_replaced_just_before_the_lock_is_not_begun_with(
    world: World, monkeypatch
):
    lock, folder = fcntl.flock, world.fleet.corpus / "tokenized"

    def too_late(descriptor, operation):
        folder.rename(world.fleet.corpus / "old")
        write_corpus(world.fleet.corpus)
        lock(descriptor, operation)

    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", too_late)
        with pytest.raises(StartError, match="is being prepared anew"):
            adopt(world)

    assert adopt(world)


@pytest.mark.parametrize("part", ["tokenized/manifest.json", "tokenized"])
def test_what_is_no_corpus_yet_is_not_held(world: World, part):
    (world.fleet.corpus / part).rename(world.fleet.corpus / "away")

    assert not adopt(world)
    assert tokenize(world)


def test_a_corpus_that_was_refused_is_not_held(world: World):
    (world.fleet.corpus / "tokenized/train-00000.bin").unlink()
    with pytest.raises(StartError):
        adopt(world)

    assert tokenize(world)


def test_a_corpus_that_only_can_be_read_will_do(world: World):
    folders = [world.fleet.corpus / "tokenized", world.fleet.corpus]
    before = contents(world.fleet.corpus)
    for folder in folders:
        folder.chmod(0o555)
    try:
        assert adopt(world)
        with pytest.raises(CorpusInUseError), replacing(folders[0]):
            pass
        assert contents(world.fleet.corpus) == before
    finally:
        for folder in folders:
            folder.chmod(0o755)


def test_without_locks_a_coordinator_runs_and_says_so(
    world: World, monkeypatch, caplog
):
    def without(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without)

    assert adopt(world)

    assert "can't be locked (No locks available)" in caplog.text
