"""The outer step goes downhill: new weights are the trained ones, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bitnet_ext.codecs import BLOCK, Codec, decode, encode
from bitnet_ext.layout import SegmentKind, num_params, segments
from bitnet_ext.newton_schulz import num_blocks
from bitnet_ext.wire.messages import Task
from bitnet_ext.wire.verdicts import RoundKind
from coordinator.control import Seed
from tests.integration.fleet import Hand, coordinator, make_corpus
from worker.gradient import mean_gradient
from worker.model.transformer import BitNetModel
from worker.shards import fetch_tokens
from worker.train import Hooks, Moments, TrainResult, batches, train

PLAIN = {
    "OUTER_RATE": 1.0,
    "OUTER_MOMENTUM": 0.0,
    "WARMUP_TOKENS": 0,
    "LEARNING_RATE": 1e-3,
    "EVALUATE_EVERY": 1000,
    "BROADCAST": "exact",
}
RATE = 5e-3
GRADIENTS = {
    "OUTER_RATE": "",
    "ROUND_KIND": "gradient",
    "LEARNING_RATE": RATE,
    "WEIGHT_DECAY": 0.0,
    "OUTER_MOMENTUM": 0.8,
}
BATCH_TOKENS = 8 * 128


@pytest.fixture
def quiet() -> Hooks:
    ticks = iter(range(10**6))
    return Hooks.quiet(lambda: float(next(ticks)))


def trained_once(
    folder: Path, quiet: Hooks, *, num_steps: int, **settings: Any
) -> dict[str, Any]:
    """Have one task trained for a real coordinator; return what there was before
    and after."""
    manifest = make_corpus(folder / "corpus", num_files=12, words=600)
    with coordinator(folder, **(PLAIN | settings)) as process:
        process.tell(Seed(tokens=num_steps * BATCH_TOKENS))
        hand = Hand(process.url, manifest)
        hand.register()
        task = hand.claim_training()
        base = hand.weights(task.base_version)
        tokens = fetch_tokens(
            hand.client.continue_download, task, hand.shape.vocab_size, lambda _: None
        )
        model = BitNetModel(hand.shape)
        result = work_of(model, base, tokens, task, quiet)
        hand.client.submit(hand.body(task, result.pseudo_gradient))
        version = process.wait_for_version(task.base_version + 1)
        assert version["run"]["newest_version"] == task.base_version + 1
        return {
            "task": task,
            "tokens": tokens,
            "model": model,
            "base": base,
            "trained": model.flat.values.numpy().copy(),
            "pseudo_gradient": result.pseudo_gradient,
            "new": hand.weights(task.base_version + 1),
            "num_steps": result.num_steps,
        }


def work_of(
    model: BitNetModel,
    base: NDArray[np.float32],
    tokens: NDArray[np.int32],
    task: Task,
    quiet: Hooks,
) -> TrainResult:
    if task.round_kind is RoundKind.GRADIENT:
        return mean_gradient(model, base, tokens, task, quiet)
    return train(model, base, Moments.zeros(model.shape), tokens, task, quiet)


def ulp(base: NDArray[np.float32], trained: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.spacing(np.maximum(np.abs(base), np.abs(trained)))


def test_the_new_weights_are_the_trained_ones(tmp_path: Path, quiet: Hooks) -> None:
    told = trained_once(tmp_path, quiet, num_steps=2, CODEC="fp32")

    assert told["num_steps"] == 2
    assert np.abs(told["trained"] - told["base"]).max() > 1e-4
    off = np.abs(told["new"].astype(np.float64) - told["trained"])
    assert (off <= ulp(told["base"], told["trained"])).all()


def test_through_int8_they_are_off_by_half_a_quantisation_step(
    tmp_path: Path, quiet: Hooks
) -> None:
    told = trained_once(tmp_path, quiet, num_steps=2, CODEC="int8")

    size = len(told["base"])
    padded = np.zeros(-(-size // BLOCK) * BLOCK, dtype=np.float32)
    padded[:size] = np.abs(told["pseudo_gradient"])
    steps = np.repeat(padded.reshape(-1, BLOCK).max(axis=1) / 127, BLOCK)[:size]
    off = np.abs(told["new"].astype(np.float64) - told["trained"])
    # Decoding rounds the product of scale and integer as well.
    decoded = np.spacing(np.abs(told["pseudo_gradient"]))
    allowed = 0.5 * steps.astype(np.float64) * (1 + 1e-6) + decoded
    assert (off <= allowed + ulp(told["base"], told["trained"])).all()
    assert off.max() > 0.0


@pytest.mark.parametrize("codec", Codec)
def test_one_step_lowers_the_loss_of_its_own_batch(
    tmp_path: Path, quiet: Hooks, codec: Codec
) -> None:
    told = trained_once(tmp_path, quiet, num_steps=1, CODEC=codec)

    assert told["num_steps"] == 1
    before = loss_of(told["model"], told["base"], told["tokens"], told["task"])
    after = loss_of(told["model"], told["new"], told["tokens"], told["task"])
    assert after < before - 0.01


@pytest.mark.parametrize("codec", Codec)
def test_the_new_weights_are_one_step_down_the_gradient(
    tmp_path: Path, quiet: Hooks, codec: Codec
) -> None:
    told = trained_once(tmp_path, quiet, num_steps=2, CODEC=codec, **GRADIENTS)

    sent = told["pseudo_gradient"]
    arrived = decode(codec, encode(codec, sent), len(sent)).astype(np.float64)
    assert told["num_steps"] == 2
    np.testing.assert_array_equal(told["trained"], told["base"])
    assert 0.01 < np.linalg.norm(sent) < 1.001
    for segment in segments(told["model"].shape):
        part = slice(segment.offset, segment.offset + segment.size)
        gradient = arrived[part].reshape(segment.shape)
        if segment.kind in (SegmentKind.LINEAR, SegmentKind.RESIDUAL):
            step = RATE * 0.2 * np.sqrt(max(segment.shape)) * by_newton(gradient)
        else:
            step = RATE * gradient / (np.abs(gradient) + 1e-8)
        due = told["base"][part] - step.reshape(-1)
        np.testing.assert_allclose(told["new"][part], due, atol=2e-6)
        assert np.abs(step).max() > 1e-4


def by_newton(gradient: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return roughly the nearest orthogonal matrix, of each block of the short side."""
    if gradient.shape[0] > gradient.shape[1]:
        return by_newton(gradient.T).T
    blocks = np.split(gradient, num_blocks(len(gradient)))
    return np.vstack([three_iterations(block) for block in blocks])


def three_iterations(half: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return what Newton-Schulz makes of a matrix in three iterations."""
    x = half / np.linalg.norm(half)
    for _ in range(3):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.parametrize("codec", Codec)
def test_one_gradient_step_lowers_the_loss_of_its_own_batch(
    tmp_path: Path, quiet: Hooks, codec: Codec
) -> None:
    told = trained_once(tmp_path, quiet, num_steps=1, CODEC=codec, **GRADIENTS)

    before = loss_of(told["model"], told["base"], told["tokens"], told["task"])
    after = loss_of(told["model"], told["new"], told["tokens"], told["task"])
    assert after < before - 0.01


def loss_of(
    model: BitNetModel,
    weights: NDArray[np.float32],
    tokens: NDArray[np.int32],
    task: Task,
) -> float:
    model.flat.load(weights)
    (batch,) = batches(tokens, task)
    assert num_params(model.shape) == len(weights)
    with torch.no_grad():
        return float(model.loss(batch.inputs, batch.targets))
