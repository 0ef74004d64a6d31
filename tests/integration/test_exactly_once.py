"""The oracle: what was accepted is in the weights once, and nothing else is.

Version 1 is all zeros, every round has one task, the codec is lossless, the outer
rate 1 and the momentum 0. For task j a worker sends -1 at coordinate j; so in the
end w[j] = 1 for every accepted j, whatever went wrong on the way. The coordinator's
clock runs twenty times too fast, so that leases end while a test waits.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from bitnet_ext.layout import ModelShape, num_params, segments
from bitnet_ext.wire.messages import SubmissionAnswer, Task
from bitnet_ext.wire.verdicts import ErrorCode
from coordinator.app import open_fleet, run_settings
from coordinator.control import Seed
from coordinator.domain.manifest import Manifest
from coordinator.service.adopting import adopt_corpus
from coordinator.service.starting import reconcile
from coordinator.settings import CoordinatorSettings
from tests.integration.fleet import (
    KEY,
    CoordinatorProcess,
    Hand,
    make_corpus,
    wait_for,
)
from worker.errors import LeaseLostError, RefusedError

NUM_TASKS = 10
HASTY = "tests.integration.hasty_coordinator"
SETTINGS = {
    "OUTER_MOMENTUM": 0.0,
    "EVALUATE_EVERY": 10**6,
    "HEARTBEAT_S": 60,
    "KEEP_VERSIONS": 1000,
}


#: AdamW that remembers nothing steps by its rate, whatever the size of a gradient.
GRADIENTS = {
    "ROUND_KIND": "gradient",
    "LEARNING_RATE": 1.0,
    "WARMUP_TOKENS": 0,
    "SCHEDULE_TOKENS": 0,
    "WEIGHT_DECAY": 0.0,
    "BETA1": 0.0,
    "BETA2": 0.0,
}
# A one among zeros loses nothing in a ternary payload either.
WAYS = [
    {"CODEC": "fp32", "OUTER_RATE": 1.0},
    {"CODEC": "ternary", "OUTER_RATE": 1.0},
    {"CODEC": "fp32", **GRADIENTS},
    {"CODEC": "ternary", **GRADIENTS},
]


@pytest.fixture(
    params=WAYS, ids=lambda way: f"{way.get('ROUND_KIND', 'delta')}-{way['CODEC']}"
)
def at_zero(
    tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[tuple[CoordinatorProcess, Manifest]]:
    manifest = make_corpus(tmp_path / "corpus", num_files=12, words=300)
    process = CoordinatorProcess(tmp_path, SETTINGS | request.param, HASTY)
    begin_at_zero(process)
    process.start()
    total = sum(shard.num_tokens for shard in manifest.train_shards())
    process.tell(Seed(tokens=-(-total // NUM_TASKS)))
    yield process, manifest
    process.stop()


def begin_at_zero(process: CoordinatorProcess) -> None:
    """Make the run, with zeros for its first weights."""
    settings = CoordinatorSettings.from_env(process._env)

    def zeros(shape: ModelShape, _seed: int) -> NDArray[np.float32]:
        return np.zeros(num_params(shape), dtype=np.float32)

    with open_fleet(settings, lambda *_: None) as fleet:
        reconcile(fleet)
        assert adopt_corpus(fleet, run_settings(settings), zeros)


class Teller:
    """Sends -1 at the coordinate of a task, and keeps count of what was accepted."""

    def __init__(self, process: CoordinatorProcess, hand: Hand) -> None:
        self.process = process
        self.hand = hand
        self.size = num_params(hand.shape)
        #: Coordinates to choose from: the embeddings, which come first.
        self.reach = segments(hand.shape)[0].size
        self.accepted: set[int] = set()

    def coordinate(self, task: Task) -> int:
        # Far apart, so that each lies in another part of the vector.
        return 1 + (task.byte_offset // task.byte_length) * 7919 % (self.reach - 1)

    def body(self, hand: Hand, task: Task, **changes: Any) -> bytes:
        vector = np.zeros(self.size, dtype=np.float32)
        vector[self.coordinate(task)] = -1.0
        return hand.body(task, vector, **changes)

    def accept(self, hand: Hand, task: Task, body: bytes) -> SubmissionAnswer:
        answer = hand.client.submit(body)
        self.note(task)
        return answer

    def note(self, task: Task) -> None:
        assert self.coordinate(task) not in self.accepted
        self.accepted.add(self.coordinate(task))


def test_every_accepted_task_counts_once_whatever_goes_wrong(
    at_zero: tuple[CoordinatorProcess, Manifest],
) -> None:
    process, manifest = at_zero
    hand = Hand(process.url, manifest, "hand")
    other = Hand(process.url, manifest, "other")
    for each in (hand, other):
        each.register()
    teller = Teller(process, hand)

    replayed = a_plain_task_sent_three_times(teller, hand)
    an_answer_lost_on_its_way(teller, hand)
    a_late_submission(teller, hand, other)
    stale_and_foreign_submissions(teller, hand, other)
    a_kill_between_claim_and_submission(teller, hand, other)
    a_kill_right_after_the_answer(teller, hand, other)
    while len(teller.accepted) < NUM_TASKS:
        task = hand.claim_training()
        teller.accept(hand, task, teller.body(hand, task))
    first_body, first_answer = replayed
    assert hand.client.submit(first_body) == first_answer

    process.wait_for_version(1 + NUM_TASKS)
    expected = np.zeros(teller.size, dtype=np.float32)
    expected[list(teller.accepted)] = 1.0
    weights = hand.weights(1 + NUM_TASKS)
    assert len(teller.accepted) == NUM_TASKS
    assert np.flatnonzero(weights).tolist() == np.flatnonzero(expected).tolist()
    assert (weights == expected).all()


def a_plain_task_sent_three_times(
    teller: Teller, hand: Hand
) -> tuple[bytes, SubmissionAnswer]:
    task = hand.claim_training()
    body = teller.body(hand, task)
    answer = teller.accept(hand, task, body)
    assert hand.client.submit(body) == answer
    teller.process.wait_for_version(2)
    assert hand.client.submit(body) == answer
    return body, answer


def an_answer_lost_on_its_way(teller: Teller, hand: Hand) -> None:
    """Send everything, hang up before the answer, and try again."""
    task = hand.claim_training()
    body = teller.body(hand, task)
    newest = teller.process.status()["run"]["newest_version"]
    with contextlib.closing(
        http.client.HTTPConnection("127.0.0.1", teller.process.port, timeout=30.0)
    ) as connection:
        connection.request(
            "POST",
            "/gradient",
            body,
            {"X-Api-Key": KEY, "Content-Type": "application/octet-stream"},
        )
        # The request is on its way in full; its answer finds nobody.
        connection.sock.shutdown(socket.SHUT_WR)
        teller.process.wait_for_version(newest + 1)
    teller.accept(hand, task, body)


def a_late_submission(teller: Teller, hand: Hand, other: Hand) -> None:
    task = hand.claim_training()
    late = teller.body(hand, task)
    query = "SELECT state FROM tasks WHERE task_id = ?"
    wait_for(
        "the end of the lease",
        lambda: teller.process.rows(query, task.task_id) == [("pending",)],
    )

    again = other.claim_training()
    assert again.task_id == task.task_id
    assert again.lease_id != task.lease_id
    with pytest.raises(LeaseLostError):
        hand.client.submit(late)
    teller.accept(other, again, teller.body(other, again))
    with pytest.raises(LeaseLostError):
        hand.client.submit(late)


def stale_and_foreign_submissions(teller: Teller, hand: Hand, other: Hand) -> None:
    task = hand.claim_training()
    stale = teller.body(hand, msgspec.structs.replace(task, base_version=1))
    assert refusal(hand, stale) == (ErrorCode.STALE_BASE, "base_version")
    foreign = teller.body(other, task)
    assert refusal(other, foreign) == (ErrorCode.LEASE_LOST, None)
    guessed = teller.body(hand, task, lease_id="0" * 32)
    assert refusal(hand, guessed) == (ErrorCode.LEASE_LOST, None)
    invented = teller.body(hand, task, task_id="t-none")
    assert refusal(hand, invented) == (ErrorCode.UNKNOWN_TASK, "task_id")
    teller.accept(hand, task, teller.body(hand, task))


def refusal(hand: Hand, body: bytes) -> tuple[ErrorCode, str | None]:
    with pytest.raises(RefusedError) as refused:
        hand.client.submit(body)
    return refused.value.code, refused.value.field


def a_kill_between_claim_and_submission(
    teller: Teller, hand: Hand, other: Hand
) -> None:
    """The lease outlives the coordinator: after a start it has time to be used."""
    task = hand.claim_training()
    start_again(teller, hand, other)
    teller.accept(hand, task, teller.body(hand, task))


def a_kill_right_after_the_answer(teller: Teller, hand: Hand, other: Hand) -> None:
    """What was accepted is durable, wherever the outer step was cut off."""
    task = hand.claim_training()
    body = teller.body(hand, task, submission_id="s-killed")
    answer = teller.accept(hand, task, body)
    start_again(teller, hand, other)
    assert hand.client.submit(body) == answer
    changed = teller.body(hand, task, submission_id="s-killed", loss_last=2.0)
    assert refusal(hand, changed) == (
        ErrorCode.SUBMISSION_CONFLICT,
        "submission_id",
    )


def start_again(teller: Teller, hand: Hand, other: Hand) -> None:
    teller.process.kill()
    teller.process.start()
    for each in (hand, other):
        each.move_to(teller.process.url)
