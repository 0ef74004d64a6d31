"""Sampling of token ids."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitnet_ext.decode import Decoder
from bitnet_ext.infer import Model
from tests.unit.worker.shapes import (
    SMALL,
    a_task,
    loaded_model,
    random_tokens,
    seeded_weights,
    silent_hooks,
)
from worker.generate import Sampling, draw, generate
from worker.model.transformer import BitNetModel
from worker.train import Moments, train


def sample(prompt, **fields) -> list[int]:
    decoder = Decoder(Model.from_flat(SMALL, seeded_weights(SMALL)))
    return list(generate(decoder, prompt, Sampling(**fields)))


def draws(logits, count=2000, **fields) -> np.ndarray:
    """Return how often each id is drawn."""
    random = np.random.default_rng(0)
    sampling = Sampling(num_tokens=1, **fields)
    found = [draw(logits, sampling, random) for _ in range(count)]
    return np.bincount(found, minlength=logits.size) / count


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

    decoder = Decoder(Model.from_flat(SMALL, base - trained.pseudo_gradient))
    sampling = Sampling(num_tokens=5, temperature=0.0)
    ids = list(generate(decoder, period[:6], sampling))

    assert ids == period[6:]


#: Probabilities 0.5, 0.25, 0.15, 0.1 of the ids 2, 0, 3, 1.
LOGITS = np.log(np.array([0.25, 0.1, 0.5, 0.15], np.float32))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [0.25, 0.1, 0.5, 0.15]),
        ({"temperature": 0.0}, [0, 0, 1, 0]),
        ({"temperature": 1e-300}, [0, 0, 1, 0]),
        # Squares, as shares.
        ({"temperature": 0.5}, [0.181, 0.029, 0.725, 0.065]),
        ({"top_k": 1}, [0, 0, 1, 0]),
        ({"top_k": 2}, [1 / 3, 0, 2 / 3, 0]),
        ({"top_k": 9}, [0.25, 0.1, 0.5, 0.15]),
        ({"top_p": 0.01}, [0, 0, 1, 0]),
        ({"top_p": 0.6}, [1 / 3, 0, 2 / 3, 0]),
        ({"top_p": 0.89}, [0.278, 0, 0.556, 0.167]),
        # Of the two likeliest the first has two thirds.
        ({"top_k": 2, "top_p": 0.6}, [0, 0, 1, 0]),
    ],
)
def test_ids_are_drawn_as_often_as_they_should_be(fields, expected) -> None:
    found = draws(LOGITS, **fields)

    np.testing.assert_allclose(found, expected, atol=0.035)
    assert ((found == 0) == (np.array(expected) == 0)).all()


def test_of_many_words_those_of_the_top_are_drawn_and_no_others() -> None:
    logits = np.random.default_rng(1).normal(size=5000).astype(np.float32)
    likeliest = set(np.argsort(-logits)[:40].tolist())

    assert set(np.flatnonzero(draws(logits, top_k=40))) == likeliest
    odds = np.exp(logits) / np.exp(logits).sum()
    share = odds[np.flatnonzero(draws(logits, 20000, top_p=0.3))]
    assert 0.29 < share.sum() <= 0.301


def test_each_id_is_part_of_the_text_when_the_next_is_asked_for() -> None:
    decoder = Decoder(Model.from_flat(SMALL, seeded_weights(SMALL)))
    sampling = Sampling(num_tokens=3, temperature=0.0)
    one = list(generate(decoder, [3, 5], sampling))

    more = list(generate(decoder, one[-1:], sampling))

    assert one + more == sample([3, 5], num_tokens=6, temperature=0.0)


@pytest.mark.parametrize(
    ("prompt", "said"), [([], "got none"), ([3, 64], "0 to 63, got 64")]
)
def test_a_bad_prompt_is_refused(prompt, said) -> None:
    with pytest.raises(ValueError, match=f"ids must .*{said}"):
        sample(prompt, num_tokens=1)


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"num_tokens": -1},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
    ],
)
def test_bad_sampling_is_refused_by_name(bad) -> None:
    (field,) = bad
    with pytest.raises(ValueError, match=f"{field} must"):
        Sampling(**({"num_tokens": 1} | bad))
