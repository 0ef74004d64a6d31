"""K local steps: cutting, order, schedule, decay, and what is left untouched."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
import torch

from bitnet_ext.layout import SegmentKind, num_params, segments
from bitnet_ext.wire.verdicts import FailCode
from tests.unit.worker.shapes import (
    HYPER,
    SMALL,
    a_task,
    loaded_model,
    random_tokens,
    seeded_weights,
    silent_hooks,
)
from worker.errors import StoppedError, TaskError
from worker.model.transformer import NO_TARGET, BitNetModel
from worker.order import sequence_starts
from worker.train import (
    Batch,
    LocalSteps,
    Moments,
    NonFiniteLossError,
    batches,
    learning_rate,
    train,
)


def run(tokens, task, *, base=None, moments=None, hooks=None):
    base = seeded_weights(SMALL) if base is None else base
    moments = moments or Moments.zeros(SMALL)
    hooks = hooks or silent_hooks()
    return train(BitNetModel(SMALL), base, moments, tokens, task, hooks)


@pytest.mark.parametrize("num_tokens", [1, 5, 16, 17, 63, 64, 65, 200])
def test_every_input_is_cut_exactly_once_with_the_token_after_it(num_tokens) -> None:
    task = a_task(num_tokens)
    shard_tokens = task.shard_bytes // 4
    tokens = np.arange(shard_tokens, dtype=np.int32)

    cut = list(batches(tokens, task))

    assert len(cut) == task.num_steps
    known = torch.cat([(b.targets != NO_TARGET).flatten() for b in cut])
    inputs = torch.cat([b.inputs.flatten() for b in cut])
    targets = torch.cat([b.targets.flatten() for b in cut])
    # The last token of a shard has no target.
    expected = list(range(min(num_tokens, shard_tokens - 1)))
    assert sorted(inputs[known].tolist()) == expected
    assert torch.equal(targets[known], inputs[known] + 1)
    assert sum(b.num_tokens for b in cut) == num_tokens


def test_the_sequences_come_in_the_order_of_the_shard() -> None:
    tokens, task = np.arange(161, dtype=np.int32), a_task(160)

    first = torch.cat([b.inputs[:, 0] for b in batches(tokens, task)])

    assert first.tolist() == sequence_starts(task).tolist()


def test_a_task_in_the_middle_of_a_shard_is_cut_from_its_blocks() -> None:
    shard = np.arange(200, dtype=np.int32)
    task = msgspec.structs.replace(
        a_task(64), byte_offset=4 * 80, shard_bytes=4 * len(shard)
    )

    (batch,) = batches(shard[64:193], task)

    assert batch.inputs[:, 0].tolist() == sequence_starts(task).tolist()
    assert torch.equal(batch.targets, batch.inputs + 1)


def test_one_step_lowers_the_loss_of_its_own_batch() -> None:
    tokens, task = random_tokens(65), a_task(64)

    result = run(tokens, task)

    trained = seeded_weights(SMALL) - result.pseudo_gradient
    assert result.num_steps == 1
    again = run(tokens, task, base=trained)
    assert again.loss_first < result.loss_first - 0.01


def test_the_pseudo_gradient_is_base_minus_trained() -> None:
    model, base = BitNetModel(SMALL), seeded_weights(SMALL)

    result = train(
        model,
        base,
        Moments.zeros(SMALL),
        random_tokens(200),
        a_task(200),
        silent_hooks(),
    )

    assert result.pseudo_gradient.dtype == np.float32
    assert result.pseudo_gradient.any()
    np.testing.assert_array_equal(
        result.pseudo_gradient, base - model.flat.values.numpy()
    )


def test_base_and_moments_are_as_they_were() -> None:
    base, moments = seeded_weights(SMALL), Moments.zeros(SMALL)

    result = run(random_tokens(200), a_task(200), base=base, moments=moments)

    np.testing.assert_array_equal(base, seeded_weights(SMALL))
    assert not moments.exp_avg.any()
    assert not moments.exp_avg_sq.any()
    assert not moments.step.any()
    assert result.moments.exp_avg.any()
    assert (result.moments.step == result.num_steps).all()


def test_kept_moments_continue_where_the_last_task_ended() -> None:
    tokens, task = random_tokens(129), a_task(128)
    first = run(tokens, task)

    kept = run(tokens, task, moments=first.moments)
    fresh = run(tokens, task)

    assert (kept.moments.step == 2 * task.num_steps).all()
    assert not np.array_equal(kept.pseudo_gradient, fresh.pseudo_gradient)


def test_the_same_task_gives_the_same_bits() -> None:
    tokens, task = random_tokens(300), a_task(300)

    one, two = run(tokens, task), run(tokens, task)
    other = run(tokens, msgspec.structs.replace(task, seed=8))

    np.testing.assert_array_equal(one.pseudo_gradient, two.pseudo_gradient)
    assert torch.equal(one.moments.exp_avg_sq, two.moments.exp_avg_sq)
    assert not np.array_equal(one.pseudo_gradient, other.pseudo_gradient)


def test_the_result_counts_inputs_and_averages_over_targets() -> None:
    tokens = random_tokens(70)

    result = run(tokens, a_task(70, batch_size=2))

    assert result.tokens == 70
    assert result.num_steps == 3
    assert result.compute_s > 0.0
    assert result.loss_first == pytest.approx(math.log(64), rel=0.2)
    lowest, highest = sorted((result.loss_first, result.loss_last))
    assert lowest - 0.3 < result.loss_mean < highest + 0.3


def test_the_learning_rate_is_linear_with_both_ends() -> None:
    hyper = msgspec.structs.replace(HYPER, lr_start=1.0, lr_end=0.0)

    assert [learning_rate(hyper, i, 5) for i in range(5)] == [1, 0.75, 0.5, 0.25, 0]
    assert learning_rate(hyper, 0, 1) == 1.0


def test_steps_use_the_scheduled_learning_rate() -> None:
    # A rate of zero in the last step: it must leave the weights alone.
    hyper = msgspec.structs.replace(HYPER, lr_start=1e-3, lr_end=0.0)
    tokens = random_tokens(33)
    both = run(tokens, a_task(32, batch_size=1, hyper=hyper))
    first = sequence_starts(a_task(32))[0]

    alone = run(
        tokens[first : first + 17],
        a_task(16, batch_size=1, hyper=msgspec.structs.replace(hyper, lr_end=1e-3)),
    )

    np.testing.assert_array_equal(both.pseudo_gradient, alone.pseudo_gradient)


def test_weight_decay_shrinks_matrices_and_embeddings_but_no_norms() -> None:
    model, hyper = loaded_model(), msgspec.structs.replace(HYPER, weight_decay=0.5)
    steps = LocalSteps(model, Moments.zeros(SMALL), hyper)
    nothing = Batch(
        torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[NO_TARGET]]), 1
    )

    steps.step(nothing, rate=0.1)

    base, values = seeded_weights(SMALL), model.flat.values.numpy()
    for segment in segments(SMALL):
        part = slice(segment.offset, segment.offset + segment.size)
        kept = 1.0 if segment.kind is SegmentKind.NORM else 0.95
        np.testing.assert_allclose(values[part], kept * base[part], rtol=1e-6)


def test_a_long_gradient_is_scaled_to_the_clip_norm() -> None:
    model, tokens, task = loaded_model(), random_tokens(65), a_task(64)
    (batch,) = batches(tokens, task)

    def norm_of_first_moment(clip_norm: float) -> float:
        hyper = msgspec.structs.replace(HYPER, clip_norm=clip_norm)
        steps = LocalSteps(loaded_model(), Moments.zeros(SMALL), hyper)
        steps.step(batch, 1e-3)
        return float(steps.moments.exp_avg.norm()) / (1 - HYPER.beta1)

    model.loss(batch.inputs, batch.targets).backward()
    whole = float(model.flat.grads.norm())
    assert norm_of_first_moment(2 * whole) == pytest.approx(whole, rel=1e-4)
    assert norm_of_first_moment(0.5 * whole) == pytest.approx(0.5 * whole, rel=1e-4)


def test_divergence_is_an_error_and_changes_nothing() -> None:
    base, moments = seeded_weights(SMALL), Moments.zeros(SMALL)
    base[0:64] = np.nan  # the embedding of token 0

    with pytest.raises(NonFiniteLossError, match="diverged") as caught:
        run(
            np.zeros(17, np.int32),
            a_task(16),
            base=base,
            moments=moments,
        )

    assert caught.value.code is FailCode.NON_FINITE_LOSS
    assert not moments.step.any()


def test_a_check_that_raises_ends_the_task_between_two_steps() -> None:
    done = []

    def check() -> None:
        if len(done) == 2:
            raise StoppedError("told to stop")

    hooks = silent_hooks(progress=lambda *step: done.append(step), check=check)
    with pytest.raises(StoppedError):
        run(random_tokens(641), a_task(640), hooks=hooks)

    assert done == [(64, 1.0), (128, 1.0)]


def test_what_is_enough_ends_early_as_if_the_rest_had_not_been_there() -> None:
    tokens, constant = random_tokens(321), msgspec.structs.replace(HYPER, lr_end=1e-3)
    constant = msgspec.structs.replace(constant, lr_start=1e-3)
    task = a_task(320, hyper=constant)
    done = []
    hooks = silent_hooks(
        progress=lambda *step: done.append(step), enough=lambda: len(done) == 3
    )

    part = run(tokens, task, hooks=hooks)

    head = msgspec.structs.replace(task, byte_length=4 * 192, num_steps=3)
    whole = run(tokens[:193], head)
    assert (part.num_steps, part.tokens) == (3, 192)
    assert part.loss_mean == whole.loss_mean
    np.testing.assert_array_equal(part.pseudo_gradient, whole.pseudo_gradient)
    assert (part.moments.step == 3).all()


def test_a_task_is_never_handed_in_before_its_first_step() -> None:
    part = run(random_tokens(321), a_task(320), hooks=silent_hooks(enough=lambda: True))

    assert (part.num_steps, part.tokens) == (1, 64)


@pytest.mark.parametrize("count", [64, 66, 0])
def test_tokens_that_do_not_fit_the_task_are_refused(count) -> None:
    with pytest.raises(TaskError, match=f"tokens must be 65 int32.*got {count} int32"):
        run(random_tokens(count), a_task(64))


def test_a_wrong_number_of_steps_is_refused() -> None:
    with pytest.raises(TaskError, match=r"num_steps must be 1 .* got 2"):
        run(random_tokens(64), a_task(64, num_steps=2))


def test_a_repetitive_stream_is_learnt_within_a_few_dozen_steps() -> None:
    period = random_tokens(11, seed=4)
    tokens = np.tile(period, 300)[:2561]

    result = run(tokens, a_task(2560))

    assert result.num_steps == 40
    assert result.loss_first == pytest.approx(math.log(64), rel=0.2)
    assert result.loss_last < 0.25 * math.log(64)


def test_moments_have_the_length_of_the_flat_vector() -> None:
    moments = Moments.zeros(SMALL)
    copy = moments.copy()
    copy.exp_avg.fill_(1.0)

    assert moments.exp_avg.shape == (num_params(SMALL),)
    assert not moments.exp_avg.any()
