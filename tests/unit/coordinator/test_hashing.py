"""How many bytes of a payload are hashed: with hundreds of them it adds up."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.unit.coordinator.fleets import World, body, frame


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Count the bytes of each piece that is hashed as long as the block runs."""
    pieces: list[int] = []
    sha256 = hashlib.sha256

    class Counting:
        def __init__(self, data: bytes = b"") -> None:
            self._hash = sha256()
            self.update(data)

        def update(self, data: bytes) -> None:
            pieces.append(len(data))
            self._hash.update(data)

        def digest(self) -> bytes:
            return self._hash.digest()

        def hexdigest(self) -> str:
            return self._hash.hexdigest()

    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "sha256", Counting)
        yield pieces


def test_a_payload_is_hashed_as_a_body_and_as_a_frame(
    running: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = running.claimed()
    sent = body(running.meta(task), frame(task, 0.5))

    with counting(monkeypatch) as pieces:
        running.send(sent)

    assert 1.5 * len(sent) < sum(pieces) < 2.5 * len(sent)


def test_closing_a_round_hashes_each_payload_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.start_run()
    names = [f"w{number}" for number in range(8)]
    for name in names:
        world.register(name)
    held = {name: world.claimed(name) for name in names}
    for name, task in held.items():
        world.submit(task, name)
    size = len(frame(task, 0.5))

    with counting(monkeypatch) as pieces:
        world.do(world.closer.close_one())

    payloads = [piece for piece in pieces if size - 100 < piece <= size]
    # As long are the published frame, the weights and the momentum of the version.
    assert len(payloads) == len(names) + 3
