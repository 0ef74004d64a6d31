"""A local step of Muon: that of the coordinator but for rounding, and AdamW's rest."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch

from bitnet_ext.layout import segments
from bitnet_ext.wire.verdicts import Optimiser
from coordinator.domain.muon import (
    OptimiserState,
    StepSizes,
    gradient_step,
    orthogonalised,
)
from tests.unit.worker.shapes import (
    HYPER,
    SMALL,
    a_task,
    loaded_model,
    random_tokens,
    seeded_weights,
    silent_hooks,
)
from worker import muon
from worker.model.flatten import segment_of
from worker.muon import Muon
from worker.train import Batch, LocalSteps, Moments, train

BY_MUON = msgspec.structs.replace(HYPER, optimiser=Optimiser.MUON)
MATRICES = [segment for segment in segments(SMALL) if segment.is_linear]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def a_batch(seed: int = 0) -> Batch:
    ids = torch.from_numpy(random_tokens(5 * SMALL.seq_len, seed=seed)).long()
    ids = ids.view(5, -1)
    return Batch(ids, ids.roll(-1, dims=1), ids.numel())


def stepped(hyper, *, by_torch: bool = False, num: int = 3):
    """Return weights and moments after some steps from the same start."""
    model, moments = loaded_model(), Moments.zeros(SMALL)
    model.plain = by_torch
    steps = LocalSteps(model, moments, hyper)
    for seed in range(num):
        steps.step(a_batch(seed), rate=3e-3)
    return model.flat.values, moments


@pytest.mark.parametrize(
    "shape", [(64, 64), (64, 128), (128, 64), (7, 12), (1, 5), (33, 9), (192, 256)]
)
def test_what_is_orthogonal_is_what_the_coordinator_makes_of_it(shape) -> None:
    x = normal(*shape)

    found = muon.orthogonalised(x)

    np.testing.assert_allclose(found, orthogonalised(x.numpy()), atol=2e-5)


def test_zeros_stay_zeros() -> None:
    assert not muon.orthogonalised(torch.zeros(8, 16)).any()


@pytest.mark.parametrize("scale", [1e-19, 1e-23, 1e-25, 1e-30, 1e-38])
def test_a_momentum_that_has_faded_away_is_not_blown_up(scale) -> None:
    x = normal(64, 128)

    found = muon.orthogonalised(scale * x)

    assert found.norm() <= muon.orthogonalised(x).norm()


def test_steps_are_those_of_a_gradient_round() -> None:
    (part, *_) = MATRICES
    first = seeded_weights(SMALL)
    zeros = np.zeros_like(first)
    state = OptimiserState(weights=first, momentum=zeros, square=zeros)
    values, mean = torch.from_numpy(first.copy()), torch.zeros(len(first))
    how = Muon(rate=0.02, decay=0.1, momentum=0.8, clip=0.5)

    for seed in range(3):
        grads = normal(len(first), seed=seed)
        sizes = StepSizes(
            rate=0.02,
            decay=0.1,
            momentum=0.8,
            beta1=0.9,
            beta2=0.95,
            eps=1e-8,
            step=seed + 1,
        )
        state = gradient_step(state, 0.5 * grads.numpy(), [part], sizes)
        muon.step(*(segment_of(v, part) for v in (values, grads, mean)), how)
        assert not segment_of(grads, part).any()

    np.testing.assert_allclose(values, state.weights, atol=1e-5)
    assert not np.array_equal(values, first)


def test_tables_and_norms_take_the_very_step_of_adamw() -> None:
    by_muon, _ = stepped(BY_MUON, num=1)
    by_adamw, _ = stepped(HYPER, num=1)

    for segment in segments(SMALL):
        same = torch.equal(segment_of(by_muon, segment), segment_of(by_adamw, segment))
        assert same is not segment.is_linear, segment.name


def test_no_matrix_has_a_second_moment() -> None:
    _, moments = stepped(BY_MUON)

    for segment in segments(SMALL):
        square = segment_of(moments.exp_avg_sq, segment)
        assert bool(square.any()) is not segment.is_linear, segment.name


def test_the_momentum_is_the_one_of_the_plan() -> None:
    kept, _ = stepped(BY_MUON)
    other, _ = stepped(msgspec.structs.replace(BY_MUON, momentum=0.5))

    assert not torch.equal(
        segment_of(kept, MATRICES[0]), segment_of(other, MATRICES[0])
    )


def test_steps_by_plain_torch_are_the_same_but_for_rounding() -> None:
    own, _ = stepped(BY_MUON, num=1)
    by_torch, _ = stepped(BY_MUON, by_torch=True, num=1)
    first = torch.from_numpy(seeded_weights(SMALL))

    for segment in MATRICES:
        one, other, start = (segment_of(v, segment) for v in (own, by_torch, first))
        # Small singular values of the gradient grow, and their rounding with them.
        assert ((one - other).norm() / (one - start).norm()).item() < 0.15, segment.name


def test_a_repetitive_stream_is_learnt_within_a_few_dozen_steps() -> None:
    tokens = np.tile(random_tokens(11, seed=4), 300)[:2561]
    hyper = msgspec.structs.replace(BY_MUON, lr_start=1e-2, lr_end=1e-2)
    task = msgspec.structs.replace(a_task(2560), hyper=hyper)

    result = train(
        loaded_model(),
        seeded_weights(SMALL),
        Moments.zeros(SMALL),
        tokens,
        task,
        silent_hooks(),
    )

    assert result.num_steps == 40
    assert result.loss_last < 0.25 * result.loss_first


# -- a plan that changes the optimiser of a run ------------------------------------

TASK = a_task(256, hyper=HYPER)
MUON_TASK = msgspec.structs.replace(TASK, hyper=BY_MUON)


def trained(task, moments):
    weights, tokens = seeded_weights(SMALL), random_tokens(257)
    return train(loaded_model(), weights, moments, tokens, task, silent_hooks())


def test_adamw_starts_anew_where_muon_kept_no_squares() -> None:
    by_muon = trained(MUON_TASK, Moments.zeros(SMALL)).moments

    after = trained(TASK, by_muon)

    fresh = trained(TASK, Moments.zeros(SMALL))
    np.testing.assert_array_equal(after.pseudo_gradient, fresh.pseudo_gradient)
    assert torch.equal(after.moments.step, fresh.moments.step)


def test_muon_goes_on_with_the_mean_of_adamw_and_the_other_way_round() -> None:
    by_adamw = trained(TASK, Moments.zeros(SMALL)).moments

    by_muon = trained(MUON_TASK, by_adamw)
    again = trained(TASK, by_muon.moments)

    assert (again.moments.step == 3 * TASK.num_steps).all()
    fresh = trained(MUON_TASK, Moments.zeros(SMALL)).pseudo_gradient
    assert not np.array_equal(by_muon.pseudo_gradient, fresh)
