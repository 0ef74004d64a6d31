"""The score of a version against the definition, token by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitnet_ext.infer import Model
from bitnet_ext.scoring import score_text, windows
from tests.unit.worker.shapes import (
    EOT,
    SMALL,
    loaded_model,
    random_tokens,
    seeded_weights,
    silent_hooks,
)
from worker.evaluate import evaluate
from worker.model.transformer import BitNetModel

#: Documents without tokens, of one, below, at and above a window and its half.
LENGTHS = (5, 0, 1, 16, 17, 24, 25, 60, 8, 0)


def stream(lengths=LENGTHS) -> np.ndarray:
    parts = [
        np.append(np.int32(EOT), random_tokens(length, seed=index))
        for index, length in enumerate(lengths)
    ]
    return np.concatenate(parts).astype(np.int32)


def naive_nats(tokens: np.ndarray) -> tuple[float, int]:
    """Score each token from the context that the definition gives it."""
    model, total, count = loaded_model(), 0.0, 0
    for position, token in enumerate(tokens.tolist()):
        if token == EOT:
            continue
        start = int(np.flatnonzero(tokens[:position] == EOT)[-1])
        offset = 0  # of the first window that reaches this token
        while start + offset + SMALL.seq_len < position:
            offset += SMALL.seq_len // 2
        context = torch.from_numpy(tokens[start + offset : position].astype(np.int64))
        with torch.no_grad():
            logits = model.logits(model(context.unsqueeze(0)))[0, -1]
        total -= torch.log_softmax(logits, -1)[token].item()
        count += 1
    return total, count


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_the_score_is_that_of_the_definition(batch_size) -> None:
    tokens = stream()

    score = evaluate(
        BitNetModel(SMALL),
        seeded_weights(SMALL),
        tokens,
        EOT,
        batch_size,
        silent_hooks(),
    )

    nats, count = naive_nats(tokens)
    assert score.tokens == count == sum(LENGTHS)
    assert score.nats == pytest.approx(nats, rel=1e-4)
    assert score.compute_s > 0.0


def test_each_token_is_scored_once_and_no_window_crosses_a_document() -> None:
    tokens = stream()
    scored = np.zeros(len(tokens), dtype=int)

    for window in windows(tokens, EOT, 16):
        inside = tokens[window.start + 1 : window.start + 1 + window.length]
        assert EOT not in inside
        assert 1 <= window.length <= 16
        scored[
            window.start + 1 + window.first_scored : window.start + 1 + window.length
        ] += 1

    np.testing.assert_array_equal(scored, (tokens != EOT).astype(int))


def test_a_token_beyond_the_first_window_sees_half_a_window_at_least() -> None:
    later = [w for w in windows(stream((200,)), EOT, 16) if w.start > 0]

    assert later
    assert all(window.first_scored == 8 for window in later)


def test_windows_of_one_token_are_possible() -> None:
    assert len(list(windows(stream((3,)), EOT, 1))) == 3


def test_a_stream_that_does_not_start_with_a_document_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"tokens must start with EOT \(0\), got \[5\]"
    ):
        list(windows(np.array([5, 0, 3], np.int32), EOT, 16))


def test_progress_counts_scored_tokens_up_to_the_end() -> None:
    seen = []

    evaluate(
        BitNetModel(SMALL),
        seeded_weights(SMALL),
        stream(),
        EOT,
        3,
        silent_hooks(progress=lambda *step: seen.append(step)),
    )

    done = [tokens for tokens, _ in seen]
    assert done == sorted(done)
    assert done[-1] == sum(LENGTHS)
    assert {seconds for _, seconds in seen} == {1.0}


def test_a_score_without_torch_is_that_of_the_worker() -> None:
    tokens, weights = stream(), seeded_weights(SMALL)
    due = evaluate(BitNetModel(SMALL), weights, tokens, EOT, 4, silent_hooks())
    model = Model.from_flat(SMALL, weights)

    score = score_text(model, tokens, eot_id=EOT, num_bytes=700, threads=2)

    assert score.tokens == due.tokens == sum(LENGTHS)
    assert score.nats == pytest.approx(due.nats, rel=1e-5)
    assert score.loss == pytest.approx(due.nats / due.tokens, rel=1e-5)
    assert score.perplexity == pytest.approx(np.exp(due.nats / due.tokens), rel=1e-4)
    assert score.bits_per_byte == pytest.approx(due.nats / np.log(2) / 700, rel=1e-5)


@pytest.mark.parametrize("tokens", [[EOT], [EOT, EOT], [5, 3], []])
def test_a_text_without_anything_to_score_is_refused(tokens) -> None:
    model = Model.from_flat(SMALL, seeded_weights(SMALL))

    with pytest.raises(ValueError, match="must"):
        score_text(model, np.array(tokens, np.int32), eot_id=EOT, num_bytes=1)
