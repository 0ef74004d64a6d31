"""A coordinator below HTTP for the tests of its use cases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.cli import main
from coordinator.settings import PREFIX
from tests.integration.fleet import make_corpus
from tests.unit.coordinator.fleets import World, open_world


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A fleet with a corpus, but without a run."""
    with open_world(tmp_path) as world:
        yield world


@pytest.fixture
def running(world: World) -> World:
    """A fleet with a run, one epoch to train, and worker w1; nothing to score."""
    world.start_run()
    world.register("w1")
    return world


@pytest.fixture
def fleet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> list[str]:
    """The options that name a data folder with version 1 of a tiny model."""
    monkeypatch.setenv(PREFIX + "PRESET", "tiny")
    make_corpus(tmp_path / "corpus")
    folders = ["--data", str(tmp_path / "data"), "--corpus", str(tmp_path / "corpus")]
    assert main(["seed-real-tasks", *folders]) == 0
    capsys.readouterr()
    return folders
