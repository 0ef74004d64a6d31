"""The mean gradient of a task: over all its targets, clipped once, nothing kept."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch

from bitnet_ext.wire.verdicts import RoundKind
from tests.unit.worker.shapes import (
    HYPER,
    SMALL,
    a_task,
    loaded_model,
    random_tokens,
    seeded_weights,
    silent_hooks,
)
from worker.errors import TaskError
from worker.gradient import mean_gradient
from worker.model.transformer import BitNetModel
from worker.train import Moments, NonFiniteLossError, batches
from worker.trainer import TorchTrainer

UNCLIPPED = msgspec.structs.replace(HYPER, clip_norm=1e9)


def gradient_of(tokens, task, *, base=None, model=None):
    base = seeded_weights(SMALL) if base is None else base
    model = model or BitNetModel(SMALL)
    return mean_gradient(model, base, tokens, task, silent_hooks())


def by_autograd(tokens, task):
    """The gradient of the mean loss over the whole stretch, as one batch."""
    model = loaded_model()
    (batch,) = batches(tokens, msgspec.structs.replace(task, batch_size=1000))
    loss = model.loss(batch.inputs, batch.targets)
    loss.backward()
    return loss.item(), model.flat.grads.numpy()


# One batch; batches of unlike length; and a last input that has no target.
@pytest.mark.parametrize(
    ("num_tokens", "shard_tokens"), [(64, 65), (192, 193), (77, 77), (80, 80)]
)
def test_it_is_that_of_all_targets_however_they_are_batched(num_tokens, shard_tokens):
    tokens = random_tokens(shard_tokens)
    task = a_task(num_tokens, hyper=UNCLIPPED, shard_bytes=4 * shard_tokens)

    result = gradient_of(tokens, task)

    loss, due = by_autograd(tokens, task)
    found = result.pseudo_gradient
    assert found.dtype == np.float32
    # int8 gradients of weights are rounded batch by batch.
    assert np.linalg.norm(found - due) < 0.02 * np.linalg.norm(due)
    assert result.loss_mean == pytest.approx(loss, rel=1e-3)
    assert result.tokens == num_tokens


def test_the_losses_are_those_of_the_batches():
    tokens, task = random_tokens(161), a_task(160)

    result = gradient_of(tokens, task)

    model = loaded_model()
    with torch.no_grad():
        losses = [
            float(model.loss(batch.inputs, batch.targets))
            for batch in batches(tokens, task)
        ]
    assert result.num_steps == len(losses) == 3
    assert result.loss_first == pytest.approx(losses[0], rel=1e-5)
    assert result.loss_last == pytest.approx(losses[-1], rel=1e-5)


def test_going_against_it_lowers_the_loss():
    tokens, task = random_tokens(161), a_task(160)
    result = gradient_of(tokens, task)

    lower = gradient_of(
        tokens, task, base=seeded_weights(SMALL) - 0.1 * result.pseudo_gradient
    )

    assert lower.loss_mean < result.loss_mean - 0.01


def test_what_is_handed_in_early_is_the_mean_over_what_was_seen():
    tokens, task = random_tokens(321), a_task(320, hyper=UNCLIPPED)
    seen = iter([False, False, True])
    hooks = silent_hooks(enough=lambda: next(seen))

    part = mean_gradient(BitNetModel(SMALL), seeded_weights(SMALL), tokens, task, hooks)

    head = msgspec.structs.replace(task, byte_length=4 * 192, num_steps=3)
    whole = gradient_of(tokens[:193], head)
    assert (part.num_steps, part.tokens) == (3, 192)
    # As near as int8 gradients of another scale are rounded.
    difference = np.linalg.norm(part.pseudo_gradient - whole.pseudo_gradient)
    assert difference < 0.01 * np.linalg.norm(whole.pseudo_gradient)


def test_the_whole_is_clipped_and_not_its_parts():
    tokens, task = random_tokens(161), a_task(160, hyper=UNCLIPPED)
    whole = gradient_of(tokens, task).pseudo_gradient
    norm = float(np.linalg.norm(whole))
    hyper = msgspec.structs.replace(HYPER, clip_norm=0.5 * norm)

    clipped = gradient_of(tokens, msgspec.structs.replace(task, hyper=hyper))

    np.testing.assert_allclose(clipped.pseudo_gradient, 0.5 * whole, rtol=1e-4)


def test_the_same_task_gives_the_same_bits_again_on_the_same_model():
    tokens, task, model = random_tokens(300), a_task(300), BitNetModel(SMALL)

    one = gradient_of(tokens, task, model=model)
    two = gradient_of(tokens, task, model=model)

    np.testing.assert_array_equal(one.pseudo_gradient, two.pseudo_gradient)


def test_micro_batches_change_no_more_than_rounding():
    tokens, task = random_tokens(161), a_task(160)
    small = BitNetModel(SMALL)
    small.micro_batch = 1

    by_one = gradient_of(tokens, task, model=small).pseudo_gradient

    whole = gradient_of(tokens, task).pseudo_gradient
    assert np.linalg.norm(by_one - whole) < 0.02 * np.linalg.norm(whole)


def test_a_loss_that_is_no_number_ends_the_task():
    base = seeded_weights(SMALL)
    base[0:64] = np.nan  # the embedding of token 0

    with pytest.raises(NonFiniteLossError, match="diverged"):
        gradient_of(np.zeros(17, np.int32), a_task(16), base=base)


def test_tokens_that_do_not_fit_the_task_are_refused():
    with pytest.raises(TaskError, match="tokens must be 65 int32"):
        gradient_of(random_tokens(60), a_task(64))


def test_the_trainer_makes_what_the_task_wants():
    trainer = TorchTrainer([1], ["reference"], torch.device("cpu"))
    base, tokens = seeded_weights(SMALL), random_tokens(65)

    def trained(kind):
        task = a_task(64, round_kind=kind)
        moments = Moments.zeros(SMALL)
        return trainer.train(SMALL, base, moments, tokens, task, silent_hooks())

    gradient, delta = trained(RoundKind.GRADIENT), trained(RoundKind.DELTA)

    assert gradient.moments is None
    assert delta.moments is not None
    due = gradient_of(tokens, a_task(64)).pseudo_gradient
    np.testing.assert_array_equal(gradient.pseudo_gradient, due)
    assert not np.array_equal(delta.pseudo_gradient, due)
