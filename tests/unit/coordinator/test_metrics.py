"""The figures for Prometheus: every line of them, for a fleet in the middle of work."""

from __future__ import annotations

import pytest

from coordinator.api.metrics import metrics_text
from coordinator.domain.accounting import Fate
from coordinator.store import workers
from tests.unit.coordinator.fleets import NUM_PARAMS, World
from tests.unit.coordinator.test_looking import looked


def samples(world: World) -> dict[str, float]:
    """Return every sample by name and labels; of each name the kind is said once."""
    text = metrics_text(looked(world), worst_lag_s=0.25)
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    named = [line.split(" ")[2] for line in text.splitlines() if line.startswith("#")]
    assert len(named) == len(set(named))
    assert {line.split(" ")[0].split("{")[0] for line in lines} == set(named)
    return {name: float(value) for name, value in map(str.split, lines)}


@pytest.fixture
def busy(running: World) -> World:
    """w1 is past its prediction, w2 hangs, w3 drains, w4 was put away."""
    for name in ("w2", "w3", "w4"):
        running.register(name)
    running.set_speed("w1", 2.0)
    running.set_speed("w2", 1.0)
    late, hangs = running.claimed("w1"), running.claimed("w2")
    for beat in range(1, 15):
        running.clock.advance(5.0)
        running.heartbeat(late, "w1", tokens_done=beat)
        running.heartbeat(hangs, "w2", tokens_done=1)
        running.heartbeat(worker_id="w3")
    running.write(lambda c: workers.change_worker(c, "w3", draining=True))
    running.write(lambda c: workers.change_worker(c, "w4", gone_at=1.0))
    running.clock.advance(2.0)
    return running


def test_workers_are_counted_by_verdict(busy: World):
    found = samples(busy)

    counts = {name: n for name, n in found.items() if name.startswith("fleet_workers{")}
    assert len(counts) == 9
    assert {name.split('"')[1] for name, count in counts.items() if count} == {
        "slow",
        "stuck",
        "draining",
        "gone",
    }
    assert found["fleet_workers_registered"] == 3


def test_each_worker_that_is_not_gone_has_its_own_figures(busy: World):
    found = samples(busy)

    assert found['fleet_worker_heartbeat_age_seconds{worker="w3"}'] == 2.0
    assert found['fleet_worker_tokens_per_second{worker="w1"}'] == 2.0
    assert found['fleet_worker_task_elapsed_seconds{worker="w1"}'] == 72.0
    assert found['fleet_worker_task_predicted_seconds{worker="w1"}'] == 60.0
    assert [name for name in found if "elapsed" in name and "w3" in name] == []
    assert [name for name in found if '"w4"' in name] == []


def test_late_tasks_and_those_that_stand_still_are_apart(busy: World):
    found = samples(busy)

    assert found["fleet_tasks_leased"] == 2
    assert found["fleet_tasks_soft_expired"] == 1
    assert found["fleet_tasks_stuck"] == 1


def test_the_round_time_is_there_and_its_overhead_once_it_is_known(running: World):
    before = samples(running)
    running.train_round(0.5)  # 10 s, in one of which it trains
    after = samples(running)

    assert before["fleet_round_seconds"] == after["fleet_round_seconds"] == 60.0
    assert "fleet_round_overhead_seconds" not in before
    assert after["fleet_round_overhead_seconds"] == 9.0


def test_rate_decay_and_the_bytes_of_the_last_round_are_there(running: World):
    before = samples(running)
    running.train_round(0.5)  # 64 of the 100,000 tokens of the warm-up
    after = samples(running)

    assert (before["fleet_learning_rate"], before["fleet_weight_decay"]) == (0.0, 0.1)
    assert after["fleet_learning_rate"] == pytest.approx(2e-3 * 64 / 100_000)
    assert "fleet_last_round_payload_bytes" not in before
    assert after["fleet_last_round_payload_bytes"] > 4 * NUM_PARAMS


def test_before_a_run_there_are_figures_too(world: World):
    found = samples(world)

    assert found["fleet_loop_lag_worst_seconds"] == 0.25
    assert found['fleet_workers{verdict="lost"}'] == 0
    assert "fleet_tasks_leased" not in found


def test_tokens_are_counted_by_what_became_of_them(running: World):
    running.train_round(0.5)
    task = running.claimed()
    running.heartbeat(task, tokens_done=16)
    running.release(task)

    found = samples(running)

    by_fate = {
        name.split('"')[1]: tokens
        for name, tokens in found.items()
        if name.startswith("fleet_tokens_by_fate{")
    }
    assert by_fate.keys() == set(Fate)
    assert {fate: tokens for fate, tokens in by_fate.items() if tokens} == {
        "applied": 64,
        "released": 16,
    }


def test_what_can_fall_is_not_called_a_counter(running: World):
    task = running.claimed()
    running.submit(task)
    before = samples(running)
    assert running.close_round()
    after = samples(running)

    fell = {name for name, value in before.items() if after[name] < value}
    assert 'fleet_tokens_by_fate{fate="accepted"}' in fell
    text = metrics_text(looked(running), worst_lag_s=0.0)
    kinds = {line.split(" ")[3] for line in text.splitlines() if line[0] == "#"}
    assert kinds == {"gauge"}
    assert "_total" not in text


def test_a_worker_has_a_ratio_of_durations_once_there_are_three(running: World):
    name = 'fleet_worker_duration_ratio{worker="w1"}'
    assert name not in samples(running)
    for _ in range(3):
        running.set_speed("w1", 64 / 60)
        running.train_round(0.5)

    assert samples(running)[name] == pytest.approx(1 / 6)
