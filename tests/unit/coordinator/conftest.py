"""A coordinator below HTTP for the tests of its use cases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

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
