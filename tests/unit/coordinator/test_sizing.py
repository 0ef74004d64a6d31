"""How much a task holds: whole sequences, no crumbs, the same seed each time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.domain import sizing

sizes = st.integers(1, 10**7)


@given(num_tokens=sizes, size=sizes)
def test_a_cut_leaves_nothing_or_at_least_half_a_task(num_tokens, size):
    taken = sizing.cut(num_tokens, size)

    left = num_tokens - taken
    assert 0 < taken <= num_tokens
    assert taken <= max(size, 1.5 * size)
    assert left == 0 or (taken == size and left >= size // 2)


@given(num_tokens=sizes, size=sizes)
def test_given_back_work_is_divided_only_above_twice_the_size(num_tokens, size):
    head = sizing.divided(num_tokens, size)

    assert head == (num_tokens if num_tokens <= 2 * size else size)


@given(
    speed=st.floats(0.01, 1e6),
    seconds=st.floats(0.5, 600.0),
    seq_len=st.sampled_from([8, 128, 256]),
)
def test_a_measured_worker_gets_whole_sequences_for_the_time(speed, seconds, seq_len):
    size = sizing.task_tokens(
        speed, seconds=seconds, batch_tokens=8 * seq_len, seq_len=seq_len
    )

    assert size % seq_len == 0
    assert size >= seq_len
    assert size == seq_len or abs(size - speed * seconds) <= seq_len / 2 + 1e-6


def test_an_unmeasured_worker_gets_a_probe_of_four_steps():
    size = sizing.task_tokens(None, seconds=600.0, batch_tokens=1024, seq_len=128)

    assert size == 4096


@pytest.mark.parametrize(
    ("age_s", "due"), [(0.0, 60.0), (20.0, 40.0), (42.0, 18.0), (59.0, 18.0)]
)
def test_a_late_claim_gets_less_but_never_under_its_least_share(age_s, due):
    assert sizing.seconds_left(60.0, round_age_s=age_s) == pytest.approx(due)


@given(speed=st.floats(0.01, 1e9), largest=st.integers(1, 10**6))
def test_no_task_is_beyond_the_limit_of_growth(speed, largest):
    size = sizing.task_tokens(
        speed, seconds=60.0, batch_tokens=64, seq_len=8, largest=largest
    )

    assert size % 8 == 0
    assert 8 <= size <= max(8, sizing.MAX_GROWTH * largest)


def piece(num_tokens: int, num_rounds: int | None = 1) -> sizing.GivenBack:
    return sizing.GivenBack(num_tokens=num_tokens, num_rounds=num_rounds)


@pytest.mark.parametrize(
    ("waiting", "due"),
    [
        ([], None),
        ([piece(100)], 0),
        ([piece(79)], None),
        ([piece(80)], 0),
        ([piece(125)], 0),
        # Neither its size nor worth dividing.
        ([piece(126)], None),
        ([piece(201)], 0),
        # For whom it fits, the oldest that does.
        ([piece(20), piece(110), piece(100)], 1),
        # It has waited for long enough, whoever comes.
        ([piece(20), piece(100, 1), piece(20, 3)], 1),
        ([piece(20), piece(20, 3), piece(100)], 1),
        ([piece(500, None)], 0),
        ([piece(1, None)], 0),
    ],
)
def test_work_that_came_back_goes_to_whom_it_fits_or_who_comes_later(waiting, due):
    assert sizing.chosen(waiting, 100, quorum=1.0) == due


def test_in_a_round_with_a_quorum_all_that_is_larger_fits_its_head():
    assert sizing.chosen([piece(126)], 100, quorum=0.5) == 0


@given(
    num_tokens=st.integers(1, 5000),
    seq_len=st.integers(1, 64),
    batch_size=st.integers(1, 9),
)
def test_steps_are_batches_of_whole_sequences(num_tokens, seq_len, batch_size):
    starts = range(0, num_tokens, seq_len)
    batches = [starts[i : i + batch_size] for i in range(0, len(starts), batch_size)]

    due = sizing.num_steps(num_tokens, seq_len=seq_len, batch_size=batch_size)

    assert due == len(batches)


def test_a_seed_is_a_function_of_run_epoch_and_shard():
    def seed(run_seed=1, epoch=1, shard_id="train-00000"):
        return sizing.order_seed(run_seed, epoch=epoch, shard_id=shard_id)

    others = [seed(run_seed=2), seed(epoch=2), seed(shard_id="train-00001")]
    assert seed() == seed()
    assert len({seed(), *others}) == 4
    assert all(0 <= number < 2**56 for number in others)


@pytest.mark.parametrize(
    ("meant_s", "predicted_s", "limit_s", "fixed_size", "due"),
    [
        (600.0, None, 7200.0, False, 750.0),
        (600.0, 590.0, 1830.0, False, 750.0),
        # A remnant that went along was meant to.
        (600.0, 880.0, 2700.0, False, 1100.0),
        # A short piece of given-back work: its lease would end before.
        (600.0, 100.0, 360.0, False, 252.0),
        (180.0, 180.0, 600.0, False, 225.0),
        (600.0, 3000.0, 7260.0, True, 5082.0),
    ],
)
def test_a_task_is_handed_in_somewhat_after_its_time_and_well_before_its_limit(
    meant_s, predicted_s, limit_s, fixed_size, due
):
    found = sizing.stop_after_s(
        meant_s=meant_s, predicted_s=predicted_s, limit_s=limit_s, fixed_size=fixed_size
    )

    assert found == pytest.approx(due)


@pytest.mark.parametrize("tokens", [16, 32, 48, 60])
def test_whole_steps_of_a_task_or_all_of_it_may_be_handed_in(tokens):
    assert sizing.is_part(tokens, 60, batch_tokens=16)


@pytest.mark.parametrize("tokens", [-16, 0, 8, 17, 59, 61, 64])
def test_nothing_else_may(tokens):
    assert not sizing.is_part(tokens, 60, batch_tokens=16)
