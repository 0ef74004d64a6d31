"""How long a lease lasts, what keeps it alive, and who can compute its id."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.domain import leases
from coordinator.domain.leases import Reported, shows_progress

SECRET = b"secret"


def reported(tokens=0, num_bytes=0, cpu_s=0.0, step_s=0.0):
    return Reported(
        tokens_done=tokens, bytes_done=num_bytes, cpu_s=cpu_s, step_s=step_s
    )


@pytest.mark.parametrize(
    ("heartbeat_s", "due"), [(0.5, 30.0), (5.0, 30.0), (5.1, 30.6), (60.0, 360.0)]
)
def test_a_lease_lives_six_heartbeats_and_at_least_half_a_minute(heartbeat_s, due):
    assert leases.ttl_s(heartbeat_s) == pytest.approx(due)


def test_the_hard_limit_is_three_predictions_and_a_minute():
    assert leases.hard_at(1000.0, 20.0) == 1120.0


@pytest.mark.parametrize(
    ("after", "since_advance_s", "due"),
    [
        (reported(tokens=11, num_bytes=5), 1e9, True),
        (reported(tokens=10, num_bytes=6), 1e9, True),
        (reported(tokens=10, num_bytes=5), 0.0, False),
        (reported(tokens=9, num_bytes=4), 0.0, False),
        (reported(10, 5, cpu_s=1.0, step_s=3.0), 0.0, False),
        # CPU time alone: five steps
        (reported(10, 5, cpu_s=2.0, step_s=3.0), 14.9, True),
        (reported(10, 5, cpu_s=2.0, step_s=3.0), 15.0, False),
        (reported(10, 5, cpu_s=2.0, step_s=0.0), 0.0, False),
        # ... none of them longer than the 40 s up to the last rise
        (reported(10, 5, cpu_s=2.0, step_s=1e6), 199.9, True),
        (reported(10, 5, cpu_s=2.0, step_s=1e6), 200.0, False),
    ],
)
def test_what_counts_as_progress(after, since_advance_s, due):
    before = reported(10, 5, cpu_s=1.0)

    assert (
        shows_progress(
            before,
            after,
            since_advance_s=since_advance_s,
            advanced_after_s=40.0,
            usual_step_s=1.0,
        )
        is due
    )


@pytest.mark.parametrize("step_s", [0.0, 1e6])
@pytest.mark.parametrize(("since_advance_s", "due"), [(3599.0, True), (3600.0, False)])
def test_before_the_first_token_cpu_time_counts_for_an_hour(
    step_s, since_advance_s, due
):
    assert (
        shows_progress(
            reported(0, 5, cpu_s=1.0),
            reported(0, 5, cpu_s=2.0, step_s=step_s),
            since_advance_s=since_advance_s,
            advanced_after_s=0.0,
            usual_step_s=None,
        )
        is due
    )


@pytest.mark.parametrize(
    ("usual_step_s", "limit_s"), [(1.0, 60.0), (12.0, 60.0), (20.0, 100.0)]
)
def test_before_the_first_token_a_measured_worker_gets_five_of_its_usual_steps(
    usual_step_s, limit_s
):
    def shows(since_advance_s):
        return shows_progress(
            reported(0, 5, cpu_s=1.0),
            reported(0, 5, cpu_s=2.0),
            since_advance_s=since_advance_s,
            advanced_after_s=3.0,
            usual_step_s=usual_step_s,
        )

    assert shows(limit_s - 0.1)
    assert not shows(limit_s)


def test_a_pause_of_the_coordinator_counts_for_nothing():
    after = leases.resumed(LEASE, ttl_s=30.0, now=1520.0, away_s=500.0)

    assert after.expires_at == 1550.0
    assert after.hard_at == 1620.0
    assert after.progress_at == 1510.0


@given(pauses=st.lists(st.floats(0.0, 100.0), max_size=20))
def test_many_pauses_move_the_hard_limit_by_no_more_than_themselves(pauses):
    lease, now = LEASE, 1010.0
    for away_s in pauses:
        now += away_s
        lease = leases.resumed(lease, ttl_s=30.0, now=now, away_s=away_s)

    assert lease.hard_at == pytest.approx(LEASE.hard_at + sum(pauses))
    assert lease.progress_at <= now


def test_heartbeats_without_progress_are_counted_from_the_first_of_them():
    def still_s(*beats):
        lease = LEASE
        for now, tokens in beats:
            lease = leases.renewed(
                lease, reported(tokens, 5), ttl_s=30.0, now=now, usual_step_s=2.0
            )
        return leases.no_progress_s(lease.stalled_at, heartbeat_at=beats[-1][0])

    # Of a worker that was away for long, the first one back proves nothing.
    assert still_s((1035.0, 10)) == 0.0
    assert still_s((1035.0, 10), (1040.0, 10), (1045.0, 10)) == 10.0
    assert still_s((1035.0, 10), (1040.0, 11)) == 0.0
    assert still_s((1035.0, 10), (1040.0, 11), (1055.0, 11), (1060.0, 11)) == 5.0


@pytest.mark.parametrize(
    ("heartbeat_s", "silence_s", "due"),
    [(5.0, 15.0, 1005.0), (5.0, 15.1, None), (1.0, 10.0, 1005.0), (1.0, 10.1, None)],
)
def test_after_a_silence_they_are_counted_anew(heartbeat_s, silence_s, due):
    stalled = replace(LEASE, stalled_at=1005.0)

    after = leases.heard_again(stalled, silence_s=silence_s, heartbeat_s=heartbeat_s)

    assert after == replace(LEASE, stalled_at=due)


def test_after_a_pause_of_the_coordinator_they_are_counted_anew():
    stalled = replace(LEASE, stalled_at=1020.0)

    after = leases.resumed(stalled, ttl_s=30.0, now=1520.0, away_s=500.0)

    assert after.stalled_at is None


def test_only_an_unmeasured_worker_is_limited_by_its_own_speed():
    said = reported(50, 5, cpu_s=2.0, step_s=2.0)

    def limit(usual_step_s):
        return leases.renewed(
            LEASE, said, ttl_s=30.0, now=1020.0, usual_step_s=usual_step_s
        ).hard_at

    assert limit(2.0) == 1120.0
    assert limit(None) == 1000.0 + 3 * 40.0 + 60.0


LEASE = leases.Lease(
    num_tokens=100,
    claimed_at=1000.0,
    progress_at=1010.0,
    expires_at=1040.0,
    hard_at=1120.0,
    reported=reported(10, 5, cpu_s=1.0, step_s=2.0),
)


@given(after_s=st.floats(0.0, 1e12), tokens=st.integers(0, 1000))
def test_what_an_unmeasured_worker_says_gives_it_two_hours_at_most(after_s, tokens):
    first = leases.first_hard_at(
        1000.0, None, num_steps=1, round_s=60.0, fixed_size=True
    )
    assert first == 8200.0
    said = reported(tokens, 5)
    told = leases.renewed(
        LEASE, said, ttl_s=30.0, now=1000.0 + after_s, usual_step_s=None
    )
    assert told.hard_at <= 8200.0


@pytest.mark.parametrize(
    ("predicted_s", "round_s", "fixed_size", "due_s"),
    [
        (20.0, 60.0, False, 20.0),
        (240.0, 60.0, False, 240.0),
        (1e9, 60.0, False, 240.0),
        (1e9, 60.0, True, 7200.0),
        (1e9, 1800.0, True, 7200.0),
    ],
)
def test_a_prediction_counts_for_four_rounds_or_two_hours_where_the_size_is_fixed(
    predicted_s, round_s, fixed_size, due_s
):
    due = leases.first_hard_at(
        1000.0, predicted_s, num_steps=2, round_s=round_s, fixed_size=fixed_size
    )

    assert due == 1000.0 + 3 * due_s + 60.0


@pytest.mark.parametrize(("num_steps", "due_s"), [(1, 500.0), (2, 300.0)])
def test_one_long_step_may_take_as_long_as_its_cpu_time_keeps_the_lease(
    num_steps, due_s
):
    due = leases.first_hard_at(
        1000.0, 100.0, num_steps=num_steps, round_s=60.0, fixed_size=False
    )

    assert due == 1000.0 + due_s + 60.0


def test_one_step_may_take_longer_than_any_round_but_not_than_two_hours():
    def limit_s(predicted_s):
        return leases.first_hard_at(
            0.0, predicted_s, num_steps=1, round_s=10.0, fixed_size=False
        )

    assert [limit_s(p) for p in (200.0, 1000.0, 1e9)] == [1060.0, 5060.0, 7200.0]


def test_a_task_is_predicted_from_its_own_speed_once_there_is_one():
    def predicted(done, elapsed_s):
        return leases.predicted_from_progress(
            num_tokens=1000, tokens_done=done, elapsed_s=elapsed_s
        )

    assert predicted(0, 10.0) is None
    assert predicted(100, 0.0) is None
    assert predicted(100, 10.0) == 100.0


@given(attempt=st.integers(1, 200), jitter=st.floats(0.0, 1.0))
def test_a_failed_task_rests_longer_each_time_but_never_over_a_minute(attempt, jitter):
    rest_s = leases.backoff_s(attempt, jitter)

    assert 0.0 <= rest_s <= 60.0
    assert rest_s <= leases.backoff_s(attempt + 1, jitter)
    assert leases.backoff_s(1, 1.0) == 2.0


def test_a_lease_id_is_computed_again_from_the_same_claim_and_from_no_other():
    first = leases.lease_id(SECRET, "t-1", 1, "c-1")

    assert first == leases.lease_id(SECRET, "t-1", 1, "c-1")
    assert len(bytes.fromhex(first)) == 16
    others = {
        leases.lease_id(b"another", "t-1", 1, "c-1"),
        leases.lease_id(SECRET, "t-2", 1, "c-1"),
        leases.lease_id(SECRET, "t-1", 2, "c-1"),
        leases.lease_id(SECRET, "t-1", 1, "c-2"),
        # Joined without a mark between them, these would be the first again.
        leases.lease_id(SECRET, "t-11", 1, "c-1"),
        leases.lease_id(SECRET, "t-1", 11, "c-1"),
    }
    assert len(others | {first}) == 7


def test_what_is_stored_of_a_lease_id_does_not_show_it():
    lease = leases.lease_id(SECRET, "t-1", 1, "c-1")

    assert len(leases.lease_hash(lease)) == 64
    assert lease not in leases.lease_hash(lease)
    assert leases.lease_hash(lease) == leases.lease_hash(lease)


@pytest.mark.parametrize(
    ("recent", "due"),
    [
        ([], None),
        ([0.5], 8.0),
        ([0.5, 9.0], 76.0),
        ([9.0, 0.5, 0.6], 9.6),
        ([0.5, 0.5, 0.5, 9.0, 9.0, 9.0, 9.0, 9.0], 8.0),
    ],
    ids=["none", "one", "two", "one of three is odd", "only the newest five"],
)
def test_the_middle_one_of_recent_tasks_tells_how_long_a_step_is(recent, due):
    assert leases.measured_step_s(recent, step_tokens=16) == due


def beaten(*, tokens, now, num_tokens=1000, head_room=1.5, paused_s=0.0, **fields):
    """Return a lease of 100 s, predicted, after a heartbeat with so many tokens."""
    lease = leases.Lease(
        num_tokens=num_tokens,
        claimed_at=0.0,
        progress_at=0.0,
        expires_at=now + 30.0,
        hard_at=leases.hard_at(0.0, 100.0) + paused_s,
        reported=reported(),
        paused_s=paused_s,
    )
    return leases.renewed(
        lease,
        reported(tokens),
        ttl_s=30.0,
        now=now,
        **{"usual_step_s": 1.0, "head_room": head_room} | fields,
    )


def test_a_hopeless_lease_ends_once_its_head_room_is_used_up():
    # One and a half times the prediction, and the slack; at twice its pace since the
    # slack it would need 450 s more.
    assert beaten(tokens=100, now=209.0).hard_at == 360.0
    assert beaten(tokens=100, now=211.0).hard_at == 211.0
    assert beaten(tokens=100, now=211.0, head_room=leases.HARD_FACTOR).hard_at == 360.0


@pytest.mark.parametrize("tokens", [0, 400, 1000])
def test_who_may_still_be_in_time_keeps_its_lease(tokens):
    assert beaten(tokens=tokens, now=220.0).hard_at == 360.0


def test_a_pause_of_the_coordinator_makes_nobody_hopeless():
    def after(own_s, tokens=90):
        return beaten(tokens=tokens, now=3600.0 + own_s, paused_s=3600.0).hard_at

    assert after(100.0, tokens=20) == 3960.0
    assert after(220.0, tokens=400) == 3960.0
    assert after(220.0) == 3820.0


def test_pauses_add_up_on_a_lease():
    lease = beaten(tokens=1, now=10.0)
    for _ in range(2):
        lease = leases.resumed(lease, ttl_s=30.0, now=50.0, away_s=15.0)

    assert (lease.paused_s, lease.hard_at) == (30.0, 390.0)
