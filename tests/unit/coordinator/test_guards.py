"""The guards of a round: clipped, left out, or merged as they came."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from bitnet_ext.codecs import Codec, decode, encode
from bitnet_ext.wire.verdicts import RoundKind
from coordinator.domain import guards
from coordinator.domain.guards import Candidate, judge, keeps_failing, size_of
from coordinator.domain.plan import TrainingPlan, learning_rate_at

SIZE = 9000
PLAN = TrainingPlan(learning_rate=1e-3, warmup_tokens=1000)


def noise(seed, scale=1.0):
    drawn = np.random.default_rng(seed).normal(size=SIZE) * scale
    return drawn.astype(np.float32)


def a_round(num=7, noisy=1.0):
    """Return submissions that share a direction."""
    return [noise(0) + noise(seed, noisy) for seed in range(1, num + 1)]


def judged(vectors, recent=(), tokens=None, codec=Codec.FP32, threads=1):
    payloads = [encode(codec, vector) for vector in vectors]
    decoded = [decode(codec, payload, SIZE) for payload in payloads]
    norms = [float(np.linalg.norm(vector.astype(np.float64))) for vector in decoded]
    tokens = tokens or [100] * len(vectors)
    candidates = [
        Candidate(tokens=count, norm=norm, size=norm)
        for count, norm in zip(tokens, norms, strict=True)
    ]
    return judge(
        candidates,
        recent,
        lambda place: (codec, payloads[place]),
        num_elements=SIZE,
        threads=threads,
    )


def ruled(*arguments, **more):
    return judged(*arguments, **more).rulings


def left_out(rulings):
    return [place for place, ruling in enumerate(rulings) if ruling.reason]


def factors(*sizes, recent=()):
    """Return the factors of a round whose submissions all point the same way."""
    unit = noise(0) / np.float32(np.linalg.norm(noise(0)))
    return [r.factor for r in ruled([unit * np.float32(s) for s in sizes], recent)]


def test_an_honest_round_is_merged_as_it_came():
    rulings = ruled(a_round())

    assert left_out(rulings) == []
    assert {ruling.factor for ruling in rulings} == {1.0}
    assert all(0.3 < ruling.cosine < 1.0 for ruling in rulings)


def test_a_norm_beyond_twice_the_median_of_its_round_is_clipped_to_that():
    assert factors(1.0, 1.0, 1.0, 1.9, 8.0) == pytest.approx([1, 1, 1, 1, 0.25])


def test_a_round_of_two_goes_by_what_was_usual_before():
    assert factors(8.0, 1.0, recent=[1.0] * 8) == pytest.approx([0.25, 1])
    assert factors(8.0, 1.0, recent=[1.0] * 7) == [1, 1]
    assert factors(8.0, 1.0) == [1, 1]


def test_a_whole_round_is_clipped_to_a_multiple_of_what_was_usual_before():
    assert factors(40.0, 40.0, 40.0, recent=[1.0] * 8) == pytest.approx([0.25] * 3)
    assert factors(5.0, 5.0, 5.0, recent=[1.0] * 8) == [1, 1, 1]


@pytest.mark.parametrize("codec", list(Codec))
def test_a_submission_against_the_rest_is_left_out_alone(codec):
    vectors = a_round()
    vectors[3] = vectors[3] * np.float32(-5.0)

    rulings = ruled(vectors, codec=codec)

    assert left_out(rulings) == [3]
    assert "cosine -0." in rulings[3].reason
    # The others are seen without it.
    assert rulings[0].cosine > 0.3


def test_a_bad_one_with_most_of_the_tokens_does_not_drag_honest_ones_out():
    vectors = [*a_round(7), noise(0) * np.float32(-5.0)]

    assert left_out(ruled(vectors, tokens=[100] * 7 + [400])) == [7]


def test_noise_that_points_a_little_against_the_rest_stays():
    rulings = ruled([noise(seed) for seed in range(1, 9)])

    assert min(ruling.cosine for ruling in rulings) < 0
    assert left_out(rulings) == []


def test_two_can_not_judge_each_other():
    rulings = ruled([noise(0), -noise(0)])

    assert left_out(rulings) == []
    assert [ruling.cosine for ruling in rulings] == [None, None]


@pytest.mark.parametrize("num", [3, 4, 8])
def test_never_more_than_half_of_a_round_is_left_out(num):
    vectors = [noise(0) * np.float32((-1) ** place) for place in range(num)]

    assert len(left_out(ruled(vectors))) <= num // 2


def test_zeros_among_others_are_left_out_and_zeros_alone_are_merged():
    nothing = np.zeros(SIZE, dtype=np.float32)

    assert left_out(ruled([*a_round(4), nothing])) == [4]
    assert left_out(ruled([nothing, noise(1)])) == [0]
    assert left_out(ruled([nothing])) == []
    assert left_out(ruled([nothing] * 4)) == []


def test_a_norm_far_beyond_its_round_is_left_out_whatever_its_direction():
    vectors = [*a_round(4), noise(0) * np.float32(1e6)]

    rulings = ruled(vectors)

    assert left_out(rulings) == [4]
    assert "times the usual norm" in rulings[4].reason


@pytest.mark.parametrize("value", [3e38, -3e38, 1e-38])
def test_the_largest_and_smallest_numbers_do_no_harm(value):
    vectors = [*a_round(4), np.full(SIZE, value, dtype=np.float32)]

    assert left_out(ruled(vectors)) == [4]


def test_a_round_that_overflows_as_a_whole_is_left_to_the_step():
    vectors = [np.full(SIZE, 3e38, dtype=np.float32)] * 3

    assert left_out(ruled(vectors)) == []


@pytest.mark.parametrize("codec", list(Codec))
def test_the_cosine_is_that_of_the_decoded_numbers_with_the_rest(codec):
    vectors, tokens = a_round(5, noisy=2.0), [100, 300, 50, 200, 100]
    decoded = [decode(codec, encode(codec, v), SIZE).astype(float) for v in vectors]

    rulings = ruled(vectors, tokens=tokens, codec=codec)

    for place, ruling in enumerate(rulings):
        rest = sum(
            count * vector
            for other, (count, vector) in enumerate(zip(tokens, decoded, strict=True))
            if other != place
        )
        mine = decoded[place]
        due = mine @ rest / (np.linalg.norm(mine) * np.linalg.norm(rest))
        assert ruling.cosine == pytest.approx(due, abs=1e-6)


def test_rulings_are_the_same_to_the_bit_for_every_number_of_threads():
    vectors = a_round()
    vectors[2] = vectors[2] * np.float32(-3.0)

    assert ruled(vectors) == ruled(vectors, threads=3)


def test_five_of_the_last_eight_left_out_is_too_many():
    assert keeps_failing([True] * 5)
    assert keeps_failing([True, False, True, False, True, True, False, True])
    assert not keeps_failing([True] * 4 + [False] * 4)
    assert not keeps_failing([])


@pytest.mark.parametrize(
    ("losses", "risen"),
    [
        ([], False),
        ([9.0, 9.0, 9.0], False),
        ([2.0, 2.07, 2.08, 2.07], True),
        ([2.0, 2.07, 2.05, 2.07], False),
        ([3.0, 2.0, 2.1, 2.2, 1.9], False),
        ([3.0, 2.0, 2.5, 2.1, 2.2, 2.1], True),
    ],
)
def test_loss_has_risen_when_three_scores_are_three_percent_above_the_best(
    losses, risen
):
    assert guards.has_risen(losses) is risen


def test_sizes_compare_over_learning_rates_and_steps():
    early = size_of(1.0, PLAN, tokens_before=0, tokens=500, num_steps=4)
    late = size_of(4.0, PLAN, tokens_before=2000, tokens=500, num_steps=4)
    long = size_of(8.0, PLAN, tokens_before=2000, tokens=2000, num_steps=16)

    assert early == pytest.approx(late) == pytest.approx(long) == 2000.0


def test_what_was_left_of_earlier_payloads_is_not_clipped_at_the_end_of_a_schedule():
    plan = msgspec.structs.replace(PLAN, schedule_tokens=100_000)
    sizes, found = [], []

    for before in range(4000, 100_000, 1000):
        norm = sum(learning_rate_at(plan, before - lag) for lag in (0, 1000, 3000))
        size = size_of(norm, plan, tokens_before=before, tokens=1000, num_steps=1)
        found += factors(size, recent=sizes[-guards.NUM_RECENT :])
        sizes.append(size)

    assert set(found) == {1.0}


def test_a_rate_of_zero_gives_a_size_all_the_same():
    over = msgspec.structs.replace(PLAN, schedule_tokens=10_000)
    at_once = msgspec.structs.replace(over, warmup_tokens=0)

    assert size_of(0.0, over, tokens_before=10_000, tokens=10, num_steps=1) == 0.0
    assert size_of(1.0, over, tokens_before=10_000, tokens=10, num_steps=1) == 5000.0
    assert size_of(1.0, at_once, tokens_before=10_000, tokens=10, num_steps=1) == 5000.0
    assert size_of(1.0, over, tokens_before=0, tokens=10_000, num_steps=1) > 1e9


def test_a_gradient_is_its_own_size():
    plan = msgspec.structs.replace(PLAN, round_kind=RoundKind.GRADIENT)

    assert size_of(3.0, plan, tokens_before=0, tokens=10, num_steps=9) == 3.0
