"""What the tests of the worker share: a stand-in coordinator and a client of it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.unit.worker.fleet import Fleet
from tests.unit.worker.stand_in import KEY, StandIn
from worker.client import Client
from worker.shutdown import SIGNALS


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Train on one thread: threads that wait for a busy core spin for seconds."""
    torch.set_num_threads(1)


@pytest.fixture
def coordinator() -> Iterator[StandIn]:
    stand_in = StandIn()
    yield stand_in
    stand_in.close()


@pytest.fixture
def client(coordinator: StandIn) -> Iterator[Client]:
    client = Client(coordinator.url, KEY, connect_s=5.0, read_s=5.0)
    yield client
    client.close()


@pytest.fixture
def handlers() -> Iterator[None]:
    """Put the handlers of the signals back that a worker catches."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def fleet(coordinator: StandIn, tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(coordinator, tmp_path)
    yield fleet
    fleet.close()
