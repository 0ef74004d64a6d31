"""The simulator of leases: it counts what goes wrong, and sees a broken rule."""

from __future__ import annotations

import numpy as np
import pytest

from coordinator.domain import leases, sizing, verdicts
from coordinator.domain.throughput import Throughput
from tests.sim import happenings, reference
from tests.sim import leases as sim
from tests.sim.bench_leases import bars, figures
from tests.sim.boxes import FAST, STEP_TOKENS, Work
from tests.sim.happenings import RATES, Fault
from tests.sim.leases import Fleet

HOURS = 2.5


def seen(rates=None, *, seed=7, hours=HOURS, num_boxes=12):
    return Fleet(seed=seed, num_boxes=num_boxes, rates=rates).run(hours)


def often(*faults):
    return dict.fromkeys(faults, 2.0)


@pytest.fixture(scope="module")
def usual():
    return figures([seen()])


def test_the_same_seed_gives_the_same_figures(usual):
    assert figures([seen()]) == usual


def test_no_living_worker_loses_its_lease(usual):
    assert usual["alive_leases_lost"] == 0
    assert usual["slow_called_stuck"] == 0


def test_an_hour_for_a_probe_is_too_short_for_one_token_a_second(
    monkeypatch,
):
    monkeypatch.setattr(leases, "MAX_UNMEASURED_S", 3600.0)
    # Or it would hand in what it has.
    monkeypatch.setattr(sizing, "STOP_FACTOR", 1e9)
    monkeypatch.setattr(sizing, "STOP_SHARE", 1e9)

    assert seen().alive_lost


def test_a_ttl_of_two_heartbeats_takes_leases_from_slow_networks(monkeypatch):
    monkeypatch.setattr(leases, "HEARTBEATS_PER_TTL", 2)
    monkeypatch.setattr(leases, "MIN_TTL_S", 10.0)

    assert seen().alive_lost


def test_without_grace_pauses_of_the_coordinator_take_leases(monkeypatch):
    monkeypatch.setattr(sim, "COORDINATOR_FAULTS", 20.0)
    assert not seen().alive_lost

    monkeypatch.setattr(leases, "resumed", lambda lease, **_: lease)

    assert seen().alive_lost


def test_a_stuck_limit_without_slack_calls_slow_workers_stuck(monkeypatch):
    monkeypatch.setattr(leases, "CPU_GRACE_STEPS", 0.5)

    assert seen().slow_called_stuck


def test_a_worker_that_hangs_is_found_within_two_minutes_where_steps_are_short():
    found = figures([seen(often(Fault.HANG, Fault.SPIN, Fault.STOP))])

    assert found["num_stuck"] > 10
    assert found["stuck_detect_s_max"] <= bars()["stuck_detect_s_max"][1]


def test_an_hour_of_grace_before_each_first_step_hides_the_hung(monkeypatch):
    monkeypatch.setattr(leases, "CPU_GRACE_FIRST_S", 3600.0)

    found = figures([seen(often(Fault.HANG, Fault.SPIN), hours=6.0)])

    name = "stuck_detect_slow_ratio_max"
    assert found[name] > bars()[name][1]


def test_the_task_of_a_killed_worker_is_free_again_within_a_ttl_and_a_sweep():
    found = seen({Fault.KILL: 2.0})

    assert len(found.free_again_s) > 5
    assert 20.0 < max(found.free_again_s) <= 31.0
    assert found.wasted["kill"] > 0


def test_a_partition_longer_than_the_ttl_counts_apart():
    found = seen({Fault.PARTITION: 2.0})

    assert found.partitions_lost > 5
    assert not found.alive_lost
    assert figures([found])["wasted_share"] == 0.0


def test_without_a_stuck_limit_the_hung_are_found_when_their_lease_ends(monkeypatch):
    name = "stuck_detect_s_max"
    by_limit = figures([seen(often(Fault.HANG))])[name]
    monkeypatch.setattr(verdicts, "STUCK_SHARE", 1e9)

    assert figures([seen(often(Fault.HANG))])[name] > by_limit + 10.0


def test_speeds_that_are_never_measured_make_tasks_of_the_wrong_length(monkeypatch):
    same = Throughput(tokens_per_s=100.0, spread=1.0)
    monkeypatch.setattr(happenings, "measured", lambda recent: same)

    assert figures([seen(hours=6.0)])["predicted_within_2x"] < 0.7


def test_a_worker_of_one_token_a_second_hands_in_the_step_that_it_has():
    found = seen(rates={})

    assert not found.alive_lost
    assert found.parts > 0
    assert max(found.task_s) < 2 * STEP_TOKENS


def some_work(**changes):
    fields = {"num_tokens": 2500, "tokens_per_s": 100.0, "stop_after_s": 1e9}
    return Work(np.random.default_rng(1), link=FAST, slowed=False, **(fields | changes))


@pytest.mark.parametrize(
    ("stop_after_s", "tokens"), [(1e9, 2500), (8.0, 1024), (14.0, 2048), (20.0, 2500)]
)
def test_a_worker_stops_at_the_first_step_after_its_time(stop_after_s, tokens):
    # Steps of about 10 s, after a download of 2 s; the last one of 5 s is a crumb.
    assert some_work(stop_after_s=stop_after_s).num_tokens == tokens


def test_work_time_stands_still_with_the_process():
    work = some_work()

    assert work.tokens(0.0) == 0
    assert work.tokens(work.total_s - FAST.up_s) == 2500
    last = work.said(work.total_s, 0.0)
    assert (last.tokens_done, last.bytes_done) == (2500, 4_500_000)
    assert sum(RATES.values()) > RATES[Fault.KILL]


def test_by_the_rules_of_the_reference_only_an_honest_calibration_holds():
    def share(too_hopeful):
        return reference.expired_share(
            [30.0], hours=200.0, too_hopeful=too_hopeful, seed=1
        )

    assert share(160.0) == 1.0
    assert share(1.0) == 0.0
    assert reference.lease_s(600.0, [(100.0, 100.0)]) == 960.0
