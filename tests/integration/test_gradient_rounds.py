"""Gradient rounds of a real coordinator: killed in the middle of a step, lied to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from bitnet_ext.codecs import Codec, decode, encode
from bitnet_ext.layout import num_params, segments
from bitnet_ext.wire.verdicts import ErrorCode, RoundKind
from coordinator.control import Seed
from coordinator.domain.initial import initial_weights
from coordinator.domain.muon import OptimiserState, gradient_step
from coordinator.domain.plan import TrainingPlan, step_sizes
from tests.integration.fleet import Hand, coordinator, make_corpus, wait_for
from worker.errors import RefusedError

RATE, WARMUP, NUM_ROUNDS = 0.02, 4000, 4
SETTINGS = {
    "ROUND_KIND": "gradient",
    "LEARNING_RATE": RATE,
    "WARMUP_TOKENS": WARMUP,
    "EVALUATE_EVERY": 10**6,
    "BROADCAST": "exact",
    "SEED": 7,
}
PLAN = TrainingPlan(
    round_kind=RoundKind.GRADIENT, learning_rate=RATE, warmup_tokens=WARMUP
)


@pytest.mark.parametrize("codec", [Codec.FP32, Codec.TERNARY])
def test_a_coordinator_killed_in_each_step_makes_the_weights_of_its_payloads(
    tmp_path: Path, codec: Codec
) -> None:
    manifest = make_corpus(tmp_path / "corpus", num_files=12, words=300)
    with coordinator(tmp_path, CODEC=codec, **SETTINGS) as process:
        process.tell(Seed(tokens=1000))
        hand = Hand(process.url, manifest)
        hand.register()
        before, due = 0, first_state(hand)
        for step in range(1, NUM_ROUNDS + 1):
            task = hand.claim_training()
            sent = noise(hand, step)
            hand.client.submit(hand.body(task, sent))

            process.kill()
            states = process.rows("SELECT state FROM rounds ORDER BY round_id DESC")
            assert states[0] == ("closing",)
            process.start()
            hand.move_to(process.url)

            process.wait_for_version(1 + step)
            tokens = task.byte_length // 4
            mean = decode(codec, encode(codec, sent), len(sent))
            sizes = step_sizes(PLAN, tokens_before=before, tokens=tokens, step=step)
            due = gradient_step(due, mean, segments(hand.shape), sizes)
            before += tokens
            assert hand.weights(1 + step).tobytes() == due.weights.tobytes()


def first_state(hand: Hand) -> OptimiserState:
    weights = initial_weights(hand.shape, SETTINGS["SEED"])
    zeros = np.zeros_like(weights)
    return OptimiserState(weights=weights, momentum=zeros, square=zeros)


def noise(hand: Hand, seed: int) -> Any:
    size = num_params(hand.shape)
    return np.random.default_rng(seed).standard_normal(size, dtype=np.float32)


def test_what_would_break_the_step_is_refused_or_left_out(tmp_path: Path) -> None:
    manifest = make_corpus(tmp_path / "corpus", num_files=12, words=300)
    with coordinator(tmp_path, CODEC="fp32", **SETTINGS) as process:
        process.tell(Seed(tokens=1000))
        hand = Hand(process.url, manifest)
        hand.register()
        task = hand.claim_training()
        size = num_params(hand.shape)

        other = msgspec.structs.replace(task, round_kind=RoundKind.DELTA)
        delta = hand.body(other, noise(hand, 1))
        assert refusal(hand, delta) == (ErrorCode.BAD_FRAME, "frame")
        nan = hand.body_of(task, np.full(size, np.nan, np.float32).tobytes())
        assert refusal(hand, nan) == (ErrorCode.NON_FINITE, "gradient")

        # Finite, so it is accepted; but its square is not.
        hand.client.submit(hand.body(task, np.full(size, 3e38, dtype=np.float32)))
        filtered = "SELECT reason FROM submissions WHERE state = 'filtered'"
        reasons = wait_for("the step", lambda: process.rows(filtered))
        assert reasons == [("not finite after the step",)]
        assert process.status()["run"]["newest_version"] == 1
        task = hand.claim_training()
        hand.client.submit(hand.body(task, noise(hand, 2)))
        process.wait_for_version(2)
        assert np.isfinite(hand.weights(2)).all()


def refusal(hand: Hand, body: bytes) -> tuple[ErrorCode, str | None]:
    with pytest.raises(RefusedError) as refused:
        hand.client.submit(body)
    return refused.value.code, refused.value.field
