"""Sampling of token ids."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.unit.worker.shapes import (
    SMALL,
    a_task,
    loaded_model,
    random_tokens,
    seeded_weights,
    silent_hooks,
)
from worker.generate import Sampling, generate
from worker.model.transformer import BitNetModel
from worker.train import Moments, train


def sample(prompt, **fields) -> list[int]:
    weights = seeded_weights(SMALL)
    return generate(BitNetModel(SMALL), weights, prompt, Sampling(**fields))


def test_the_same_seed_gives_the_same_ids() -> None:
    one = sample([3, 5], num_tokens=20, seed=1)

    assert one == sample([3, 5], num_tokens=20, seed=1)
    assert one != sample([3, 5], num_tokens=20, seed=2)
    assert len(one) == 20
    assert all(0 <= token < SMALL.vocab_size for token in one)


def test_temperature_zero_takes_the_likeliest_id() -> None:
    model, ids = loaded_model(), [3, 5]
    for _ in range(5):
        logits = model.logits(model(torch.tensor([ids])))[0, -1]
        ids.append(int(logits.argmax()))

    assert sample([3, 5], num_tokens=5, temperature=0.0) == ids[2:]
    assert sample([3, 5], num_tokens=5, temperature=1e-30) == ids[2:]


def test_a_prompt_longer_than_the_window_keeps_its_end() -> None:
    prompt = random_tokens(40).tolist()

    assert sample(prompt, num_tokens=4, temperature=0.0) == sample(
        prompt[-16:], num_tokens=4, temperature=0.0
    )


def test_the_stop_id_ends_the_text() -> None:
    free = sample([3], num_tokens=30, seed=5)

    stopped = sample([3], num_tokens=30, seed=5, stop_id=free[4])

    assert stopped == free[: free.index(free[4]) + 1]


def test_a_trained_model_continues_what_it_learnt() -> None:
    period = list(range(10, 21))
    tokens = np.array(period * 300, np.int32)[:2561]
    model, base = BitNetModel(SMALL), seeded_weights(SMALL)
    trained = train(
        model, base, Moments.zeros(SMALL), tokens, a_task(2560), silent_hooks()
    )

    ids = generate(
        model,
        base - trained.pseudo_gradient,
        period[:6],
        Sampling(num_tokens=5, temperature=0.0),
    )

    assert ids == period[6:]


@pytest.mark.parametrize(
    ("prompt", "said"), [([], "got none"), ([3, 64], "0 to 63, got 64")]
)
def test_a_bad_prompt_is_refused(prompt, said) -> None:
    with pytest.raises(ValueError, match=f"prompt must hold .*{said}"):
        sample(prompt, num_tokens=1)


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"num_tokens": -1}])
def test_bad_sampling_is_refused_by_name(bad) -> None:
    (field,) = bad
    with pytest.raises(ValueError, match=f"{field} must"):
        Sampling(**({"num_tokens": 1} | bad))
