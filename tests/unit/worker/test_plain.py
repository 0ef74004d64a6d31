"""The model in plain PyTorch is the model of our kernels, and steps in parts are steps.

Gradients of the kernels are int8 products, so theirs are held to 1.5 % of the whole
gradient and 3 % of a tensor, as in `test_transformer`; losses to 0.1 %.
"""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch

from bitnet_ext import fused
from bitnet_ext.fused import AdamW
from bitnet_ext.layout import segments
from tests.unit.worker.shapes import (
    EOT,
    GROUPED,
    HYPER,
    SMALL,
    a_task,
    loaded_model,
    plain_loss,
    plain_parameters,
    random_tokens,
    seeded_weights,
    silent_hooks,
)
from worker.evaluate import evaluate
from worker.model import plain
from worker.model.flatten import segment_of
from worker.model.transformer import NO_TARGET
from worker.train import Batch, LocalSteps, Moments, NonFiniteLossError, train


def a_batch(shape=SMALL) -> Batch:
    """Return sequences of which some have few targets, and one has none."""
    random = torch.Generator().manual_seed(5)
    ids = torch.randint(shape.vocab_size, (5, shape.seq_len), generator=random)
    targets = ids.roll(-1, dims=1)
    targets[1, 3:], targets[3, :] = NO_TARGET, NO_TARGET
    return Batch(ids, targets, ids.numel())


def a_model(shape=SMALL, *, by_torch: bool = False, micro_batch: int | None = None):
    model = loaded_model(shape)
    model.plain, model.micro_batch = by_torch, micro_batch
    return model


def gradient(shape=SMALL, **how) -> tuple[float, torch.Tensor]:
    """Return the loss of a batch and its flat gradient, before any clip."""
    moments = Moments.zeros(shape)
    unclipped = msgspec.structs.replace(HYPER, clip_norm=1e9)
    steps = LocalSteps(a_model(shape, **how), moments, unclipped)
    nats = steps.step(a_batch(shape), rate=0.0)
    # A step leaves zeros where its gradient was; the first moment is a share of it.
    return nats, moments.exp_avg / (1.0 - HYPER.beta1)


def error(own: torch.Tensor, exact: torch.Tensor) -> float:
    return ((own - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("shape", [SMALL, GROUPED], ids=["heads", "grouped"])
def test_loss_and_gradients_are_those_of_the_kernels(shape) -> None:
    own_nats, own = gradient(shape)

    nats, by_torch = gradient(shape, by_torch=True)

    assert nats == pytest.approx(own_nats, rel=1e-3)
    assert error(own, by_torch) < 0.015
    for segment in segments(shape):
        part = segment_of(own, segment), segment_of(by_torch, segment)
        assert error(*part) < 0.03, segment.name


@pytest.mark.parametrize("shape", [SMALL, GROUPED], ids=["heads", "grouped"])
def test_loss_and_gradients_are_those_of_the_twin_to_the_last_digits(shape) -> None:
    batch = a_batch(shape)
    params = plain_parameters(shape, seeded_weights(shape))
    expected = plain_loss(shape, params, batch.inputs, batch.targets)
    expected.backward()

    nats, by_torch = gradient(shape, by_torch=True)

    assert nats == pytest.approx(expected.item(), rel=1e-5)
    for segment in segments(shape):
        part = segment_of(by_torch, segment)
        assert error(part, params[segment.name].grad) < 1e-3, segment.name


def test_both_score_a_stream_alike() -> None:
    tokens = random_tokens(100)
    tokens[::30] = EOT
    weights = seeded_weights(SMALL)

    own, by_torch = (
        evaluate(a_model(by_torch=which), weights, tokens, EOT, 4, silent_hooks())
        for which in (False, True)
    )

    assert by_torch.nats == pytest.approx(own.nats, rel=1e-3)


def test_both_learn_at_the_same_pace() -> None:
    tokens, base = np.tile(random_tokens(11), 60)[:641], seeded_weights(SMALL)

    own, by_torch = (
        train(
            a_model(by_torch=which),
            base,
            Moments.zeros(SMALL),
            tokens,
            a_task(640),
            silent_hooks(),
        )
        for which in (False, True)
    )

    assert by_torch.loss_last < 0.5 * by_torch.loss_first
    assert by_torch.loss_last == pytest.approx(own.loss_last, rel=0.05)
    assert by_torch.pseudo_gradient.any()


def test_divergence_is_noticed_without_the_kernels_too() -> None:
    base = seeded_weights(SMALL)
    base[: SMALL.hidden_size] = np.nan  # the embedding of token 0
    model = a_model(by_torch=True)

    with pytest.raises(NonFiniteLossError, match="diverged"):
        train(
            model,
            base,
            Moments.zeros(SMALL),
            np.zeros(17, np.int32),
            a_task(16),
            silent_hooks(),
        )


@pytest.mark.parametrize("step", [1, 7])
def test_adamw_makes_the_step_of_the_kernel(step) -> None:
    how = AdamW(
        rate=1e-2, decay=0.1, beta1=0.9, beta2=0.95, eps=1e-8, step=step, clip=0.3
    )
    random = np.random.default_rng(0)
    vectors = [random.normal(size=100).astype(np.float32) for _ in range(3)]
    vectors.append(random.random(100, dtype=np.float32))
    copies = [torch.from_numpy(vector.copy()) for vector in vectors]

    fused.adamw(*vectors, how)
    plain.adamw(*copies, how)

    for ours, theirs in zip(vectors, copies, strict=True):
        torch.testing.assert_close(theirs, torch.from_numpy(ours))


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 9])
@pytest.mark.parametrize(
    ("by_torch", "most"), [(True, 1e-5), (False, 0.02)], ids=["torch", "kernels"]
)
def test_a_step_in_parts_is_the_same_step(by_torch, most, micro_batch) -> None:
    whole_nats, whole = gradient(by_torch=by_torch)

    nats, parts = gradient(by_torch=by_torch, micro_batch=micro_batch)

    assert nats == pytest.approx(whole_nats, rel=1e-5)
    assert error(parts, whole) < most


def test_no_more_sequences_than_a_micro_batch_are_trained_at_a_time() -> None:
    model, seen = a_model(micro_batch=2), []
    loss = model.loss
    model.loss = lambda ids, targets: seen.append(len(ids)) or loss(ids, targets)

    LocalSteps(model, Moments.zeros(SMALL), HYPER).step(a_batch(), 1e-3)

    assert seen == [2, 2, 1]


def test_the_number_of_threads_reaches_every_layer() -> None:
    model = loaded_model(replace(SMALL, num_layers=3))

    model.threads = 3

    layers = list(model.layers)
    assert [layer.threads for layer in layers] == [3, 3, 3]
    assert {layer.to_down.threads for layer in layers} == {3}
    assert {layer.to_qkv.threads for layer in layers} == {3}
