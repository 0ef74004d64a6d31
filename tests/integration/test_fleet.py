"""A real coordinator and two real workers train one epoch of generated text.

What was trained is counted by a proxy that stands between them, and the weights are
computed anew from what it saw: not one figure is taken on the coordinator's word.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from bitnet_ext.chain import next_link
from bitnet_ext.codecs import Codec, decode
from bitnet_ext.frames import decode_frame
from bitnet_ext.layout import segments
from bitnet_ext.wire.verdicts import RoundKind
from coordinator.control import Seed
from coordinator.domain.initial import initial_weights
from coordinator.domain.manifest import Manifest
from coordinator.domain.muon import OptimiserState, StepSizes, gradient_step
from tests.integration.fleet import (
    Hand,
    coordinator,
    make_corpus,
    wait_for,
    workers,
)
from tests.integration.recorder import Recorder, recording
from worker.errors import LeaseLostError

RATE, DECAY = 0.9, 0.8
SETTINGS = {
    "ROUND_S": "auto",
    "ROUND_MIN_S": 1,
    "ROUND_MAX_S": 2,
    "EVALUATE_EVERY": 1000,
    "WARMUP_TOKENS": 0,
    "KEEP_VERSIONS": 1000,
    "OUTER_MOMENTUM": DECAY,
    "SEED": 7,
}
#: Of gradient rounds; the rate goes by the tokens that were seen on the wire.
PEAK, WARMUP = 2e-2, 10_000
OF_KIND = {
    RoundKind.DELTA: {"OUTER_RATE": RATE},
    RoundKind.GRADIENT: {"LEARNING_RATE": PEAK, "WARMUP_TOKENS": WARMUP},
}
MAY_TRAIN_INVENTED_TEXT = {"BITNET_ALLOW_SYNTHETIC_SHARDS": "true"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What is left when the epoch is over."""

    kind: RoundKind
    manifest: Manifest
    status: Any
    seen: Recorder
    #: What a worker that was too late got for its submission.
    late: BaseException | None
    weights: Any
    shape: Any
    rows: list[tuple[Any, ...]]
    #: Round time and overhead of each round.
    rounds: list[tuple[Any, ...]]


@pytest.fixture(scope="module", params=RoundKind)
def trained(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Trained]:
    folder, kind = tmp_path_factory.mktemp("fleet"), request.param
    chosen = SETTINGS | {"ROUND_KIND": kind} | OF_KIND[kind]
    manifest = make_corpus(folder / "corpus", synthetic=True)
    epoch = sum(shard.num_tokens for shard in manifest.train_shards())
    with coordinator(folder, TOKEN_BUDGET=epoch, **chosen) as process:
        hand = Hand(process.url, manifest, "latecomer")
        hand.register()
        with (
            recording(process.port) as (url, seen),
            workers(folder, url, "one", "two", **MAY_TRAIN_INVENTED_TEXT),
        ):
            # One could train the whole epoch while the other still times itself.
            wait_for("both workers", lambda: num_timed(process.status()) == 2)
            process.tell(Seed())
            late = too_late(hand)
            status = wait_for(
                "the end of the run",
                lambda: finished(process.status()),
                timeout_s=240.0,
            )
        yield Trained(
            kind=kind,
            manifest=manifest,
            status=status,
            seen=seen,
            late=late,
            weights=hand.weights(status["run"]["newest_version"]),
            shape=hand.shape,
            rows=process.rows("SELECT task_id, version FROM submissions"),
            rounds=process.rows("SELECT round_s, overhead_s FROM rounds"),
        )


def num_timed(status: Any) -> int:
    speeds = [worker["calibrated_tokens_per_s"] for worker in status["workers"]]
    return sum(speed is not None for speed in speeds)


def finished(status: Any) -> Any:
    """Return the status once the run is over and its last version was looked at."""
    run, health = status["run"], status["ternary"]
    is_known = health is not None and health["version"] == run["newest_version"]
    return status if run["state"] == "finished" and is_known else None


def too_late(hand: Hand) -> BaseException | None:
    """Claim a task, give it back, and submit something for it all the same."""
    task = hand.claim_training()
    body = hand.body(task, np.ones_like(hand.weights(task.base_version)))
    hand.release(task)
    try:
        hand.client.submit(body)
    except LeaseLostError as error:
        return error
    return None


def test_the_held_out_loss_falls(trained: Trained) -> None:
    first, last = trained.status["evaluations"][0], trained.status["evaluations"][-1]

    assert last["version"] == trained.status["run"]["newest_version"]
    # A wrong sign, on a busy machine, was seen to let it fall by half as much.
    assert last["loss"] < first["loss"] - 1.0


def test_training_flips_some_ternary_values_of_each_matrix(trained: Trained) -> None:
    health = trained.status["ternary"]

    assert health["before"] in [row["version"] for row in trained.status["evaluations"]]
    assert len(health["matrices"]) == 7 * trained.shape.num_layers
    assert all(0.0 < matrix["flips"] < 1.0 for matrix in health["matrices"])


def test_the_round_time_goes_by_what_was_measured(trained: Trained) -> None:
    *closed, (last_s, open_s) = trained.rounds

    assert {round_s for round_s, _ in closed[:3]} == {2.0}
    assert all(1.0 <= round_s <= 2.0 for round_s, _ in trained.rounds)
    assert all(overhead_s > 0.0 for _, overhead_s in closed)
    assert open_s is None
    shown = trained.status["round"]
    assert shown["round_s"] == last_s
    assert shown["round_reason"].startswith(f"Overhead {shown['overhead_s']:.2g} s of")


def test_both_workers_took_part(trained: Trained) -> None:
    names = {block["worker_id"] for block, *_ in trained.seen.submissions}

    assert names == {"one", "two"}


def test_every_token_of_the_epoch_was_trained_exactly_once(trained: Trained) -> None:
    counts = trained.seen.times_trained(trained.manifest)

    for shard_id, count in counts.items():
        assert (count == 1).all(), shard_id


def test_a_submission_sent_twice_gets_the_same_answer(trained: Trained) -> None:
    firsts = [(status, answer) for _, _, status, answer in trained.seen.submissions]

    assert firsts
    assert trained.seen.repeats == firsts


def test_a_submission_after_its_lease_is_refused(trained: Trained) -> None:
    assert isinstance(trained.late, LeaseLostError)
    assert trained.late.field is None or trained.late.field == "lease_id"


def test_every_accepted_task_was_applied_exactly_once(trained: Trained) -> None:
    """The weights are those that the payloads seen on the wire lead to.

    Duplicates and the late submission are no part of it: had one of them changed a
    single number, or had one payload been left out, the bytes would differ.
    """
    accepted = {
        block["task_id"]: (block, frame)
        for block, frame, status, _ in trained.seen.submissions
        if status == 200
    }
    by_base: dict[int, list[tuple[Any, bytes]]] = {}
    for block, frame in accepted.values():
        by_base.setdefault(block["base_version"], []).append((block, frame))
    weights = initial_weights(trained.shape, SETTINGS["SEED"])
    zeros, published = np.zeros_like(weights), weights.copy()
    state = OptimiserState(weights=weights, momentum=zeros, square=zeros)

    before = 0
    for step, base in enumerate(sorted(by_base), start=1):
        mean = mean_of(by_base[base], trained.seen)
        tokens = sum(block["tokens"] for block, _ in by_base[base])
        if trained.kind is RoundKind.DELTA:
            state = outer(state, mean)
        else:
            rate = PEAK * min(1.0, (before + tokens // 2) / WARMUP)
            state = by_muon(state, mean, trained.shape, rate=rate, step=step)
        next_link(Codec.INT8, state.weights, published)
        before += tokens

    assert sorted(by_base) == list(range(1, len(by_base) + 1))
    assert trained.status["run"]["newest_version"] == len(by_base) + 1
    assert published.tobytes() == trained.weights.tobytes()
    assert len(trained.rows) == len(accepted)


def outer(state: OptimiserState, mean: Any) -> OptimiserState:
    momentum = np.float32(DECAY) * state.momentum + mean
    step = np.float32(DECAY) * momentum + mean
    return OptimiserState(
        weights=state.weights - np.float32(RATE) * step,
        momentum=momentum,
        square=state.square,
    )


def by_muon(
    state: OptimiserState, mean: Any, shape: Any, *, rate: float, step: int
) -> OptimiserState:
    sizes = StepSizes(
        rate=rate,
        decay=0.1,
        momentum=DECAY,
        beta1=0.9,
        beta2=0.95,
        eps=1e-8,
        step=step,
    )
    return gradient_step(state, mean, segments(shape), sizes)


def mean_of(submissions: list[tuple[Any, bytes]], seen: Recorder) -> Any:
    """Return the token-weighted mean, in the order of the text."""

    def place(pair: tuple[Any, bytes]) -> tuple[str, int]:
        terms = seen.tasks[pair[0]["task_id"]]
        return terms["shard_id"], terms["byte_offset"]

    total = sum(block["tokens"] for block, _ in submissions)
    mean: Any = 0
    for block, frame in sorted(submissions, key=place):
        header, payload = decode_frame(frame)
        assert header.codec is Codec.INT8
        vector = decode(header.codec, payload, header.num_elements)
        mean = mean + np.float32(block["tokens"] / total) * vector
    return mean


def test_the_event_loop_was_never_held_up(trained: Trained) -> None:
    # A machine that does other things delays it too; a blocking call would for long.
    assert trained.status["server"]["loop_lag_ms"] < 1000.0
