"""The view of the fleet says what is so, at every turn of a story."""

from __future__ import annotations

import logging

import msgspec
import pytest

from bitnet_ext.layout import num_params
from bitnet_ext.wire.verdicts import RoundKind
from coordinator.domain.errors import RefusedError
from coordinator.service.claiming import MIN_FREE_BYTES
from coordinator.service.fleet import Known
from coordinator.service.grace import extend_leases
from coordinator.service.looking import look
from coordinator.service.sweeping import keep_clock
from coordinator.service.view import FleetView
from coordinator.store import clock, runs, workers
from coordinator.verbs import _AtRest
from tests.fakes import START
from tests.unit.coordinator.fleets import NUM_PARAMS, PLAN, SHAPE, World


def looked(
    world: World, *, history: bool = True, known: Known | None = None
) -> FleetView:
    now = world.clock.now()
    return world.read(
        lambda c: look(
            c,
            known or world.fleet,
            now=now,
            loop_lag_ms=1.26,
            insecure_http=False,
            history=history,
        )
    )


def lane(view, worker_id):
    return next(lane for lane in view.round.lanes if lane.worker_id == worker_id)


def worker(view, worker_id):
    return next(row for row in view.workers if row.worker_id == worker_id)


def test_before_a_corpus_the_page_says_what_to_do(world: World):
    world.fleet.manifest = None

    view = looked(world)

    assert "bitnet-coordinator tokenize-corpus" in view.missing
    assert (view.run, view.training, view.round, view.tasks) == (None,) * 4
    assert view.workers == []
    assert view.server.loop_lag_ms == 1.3


def test_a_corpus_that_cannot_be_used_is_named_on_the_page(world: World):
    world.fleet.manifest = None
    world.fleet.corpus_fault = "shard 7 is damaged"

    assert "shard 7 is damaged" in looked(world).missing


def test_a_disk_without_room_for_a_result_is_seen_until_a_claim_finds_room(
    running: World, caplog
):
    caplog.set_level(logging.INFO, "coordinator.service.claiming")
    running.register("w1")
    running.fs.free = MIN_FREE_BYTES - 1
    for _ in range(2):
        with pytest.raises(RefusedError):
            running.claim()

    assert looked(running).missing == (
        "No work is given out until there is room: the data folder must have "
        f"{MIN_FREE_BYTES} bytes free, has {MIN_FREE_BYTES - 1}"
    )

    running.fs.free = MIN_FREE_BYTES
    running.claim()

    assert looked(running).missing is None
    events = [getattr(record, "event", None) for record in caplog.records]
    assert events == ["disk.low", "disk.mended"]


def test_before_the_first_epoch_it_says_what_to_do_next(world: World):
    world.start_run(seeded=False)

    view = looked(world)

    assert "bitnet-coordinator seed-real-tasks" in view.missing
    assert view.run.num_params == num_params(SHAPE)


def test_after_an_epoch_that_failed_it_says_what_to_do(running: World):
    running.write(lambda c: runs.drop_ranges(c, "r-1"))

    view = looked(running)

    assert "No task of epoch 1 was accepted" in view.missing
    assert "bitnet-coordinator seed-real-tasks" in view.missing
    running.change_run(state="finished")
    assert looked(running).missing is None


def test_a_fresh_run(running: World):
    view = looked(running)

    assert view.missing is None
    run = view.run
    assert (run.state, run.preset, run.epoch) == ("running", "tiny", 1)
    assert (run.epoch_tokens, run.epoch_tokens_accepted) == (1504, 0)
    assert (run.newest_version, run.best_version, run.tokens_per_s) == (1, None, None)
    assert run.eta.reason == "No token budget is set."
    # 200 bytes of gzip for 300 bytes of text
    assert run.gzip_bits_per_byte == pytest.approx(8 * 200 / 300)
    assert view.tasks.range_tokens == 1504
    assert (view.round.state, view.round.lanes) == ("open", [])
    assert worker(view, "w1").verdict == "idle"


def test_as_of_a_moment_before_the_claim_no_time_has_passed(running: World):
    running.register("w2")
    running.clock.advance(2.0)
    running.claimed()
    running.write(lambda c: workers.change_worker(c, "w2", lease_lost_at=START + 2.0))
    running.clock.advance(-2.0)  # when the clock of a killed coordinator was stored

    view = looked(running)

    facts = worker(view, "w1").facts
    assert (facts.elapsed_s, facts.progress_age_s) == (0.0, 0.0)
    assert worker(view, "w2").facts.lease_lost_s == 0.0


def test_a_worker_in_the_middle_of_its_task(running: World):
    running.set_speed("w1", 8.0)
    task = running.claimed()
    running.clock.advance(10.0)
    running.heartbeat(task, tokens_done=120)

    view = looked(running)

    row = worker(view, "w1")
    assert (row.verdict, row.evidence) == ("computing", "25 % of its task done.")
    assert (row.task_id, row.tokens_done, row.num_tokens) == (task.task_id, 120, 480)
    assert (row.claimed_at, row.predicted_s) == (START, 60.0)
    assert (lane(view, "w1").tokens_done, lane(view, "w1").outcome) == (120, None)
    assert view.round.first_claim_at == START
    assert view.tasks.leased == 1


def test_a_worker_that_is_back_waits_and_its_lane_is_full(running: World):
    running.register("w2")
    first, _second = running.claimed("w1"), running.claimed("w2")
    running.clock.advance(10.0)
    running.submit(first, "w1")

    view = looked(running)

    assert worker(view, "w1").verdict == "waiting"
    full = lane(view, "w1")
    assert (full.outcome, full.tokens_done, full.ended_at - START) == ("back", 64, 10.0)
    assert view.run.tokens_accepted == view.run.epoch_tokens_accepted == 64
    assert (view.tasks.done, view.tasks.leased) == (1, 1)


def test_a_worker_that_hangs_on_without_its_lease_is_stuck_until_it_lets_go(
    running: World,
):
    running.set_speed("w1", 8.0)
    task = running.claimed()
    for _ in range(12):
        running.clock.advance(25.0)
        running.heartbeat(task, cpu_s=running.clock.monotonic())
        running.sweep()

    row = worker(looked(running), "w1")
    assert (row.verdict, row.task_id) == ("stuck", None)
    assert row.evidence.endswith("ago, and has not let go of the task.")

    running.heartbeat(phase="idle")
    assert worker(looked(running), "w1").verdict == "idle"


def test_a_clock_that_jumps_ahead_over_a_restart_makes_nobody_slow(running: World):
    running.set_speed("w1", 8.0)
    task = running.claimed()  # 60 s
    running.do(keep_clock(running.fleet))
    running.clock.advance(3600.0)
    extend_leases(running.fleet)
    running.clock.advance(20.0)
    running.heartbeat(task, tokens_done=120)

    row = worker(looked(running), "w1")

    assert (row.verdict, row.facts.elapsed_s) == ("computing", 20.0)


def test_a_process_that_starts_anew_has_let_go_of_its_task(running: World):
    running.claimed()
    running.clock.advance(31.0)
    running.sweep()
    running.heartbeat()

    running.claimed()
    running.clock.advance(31.0)
    running.sweep()
    running.register("w1")

    assert worker(looked(running), "w1").verdict == "idle"


def test_who_gave_its_task_back_does_not_wait_for_its_round(running: World):
    running.release(running.claimed())

    assert worker(looked(running), "w1").verdict == "idle"


def test_a_silent_worker_is_lost(running: World):
    running.clock.advance(31.0)

    row = worker(looked(running), "w1")

    assert (row.verdict, row.evidence) == ("lost", "No heartbeat for 31 s, limit 30 s.")


def test_silence_while_nobody_could_hear_is_not_the_workers(running: World):
    task = running.claimed()
    ran_until = running.clock.now()
    running.write(lambda c: clock.keep(c, ran_until))
    running.clock.advance(300.0)  # as long as no coordinator ran
    extend_leases(running.fleet)
    running.clock.advance(30.0)

    row = worker(looked(running), "w1")

    assert (row.verdict, row.facts.heartbeat_age_s) == ("computing", 30.0)
    assert row.task_id == task.task_id
    running.clock.advance(1.0)
    assert worker(looked(running), "w1").verdict == "lost"


def test_speed_and_end_come_from_closed_rounds(running: World):
    running.change_run(token_budget=320 + 640)
    for _ in range(4):
        running.set_speed("w1", 64 / 60)
        running.train_round(0.5)  # 64 tokens in 10 s
    few = looked(running).run
    running.set_speed("w1", 64 / 60)
    running.train_round(0.5)

    run = looked(running).run

    assert few.eta.reason == "Needs 5 closed rounds, there are 4."
    assert run.newest_version == 6
    assert run.tokens_per_s == pytest.approx(6.4)
    assert run.eta.at - START == pytest.approx(50.0 + 100.0)


def test_what_became_of_tokens_is_shown_for_worker_and_fleet(running: World):
    running.train_round(0.5)
    running.register("w2")
    lost = running.claimed("w2")
    running.clock.advance(5.0)
    running.heartbeat(lost, "w2", tokens_done=16)
    running.release(lost, "w2")

    view = looked(running)

    first, second = (worker(view, name).books.tally for name in ("w1", "w2"))
    assert (first.trained, first.applied, first.wasted) == (64, 64, {})
    assert (second.trained, second.wasted) == (16, {"released": 16})
    whole = view.run.tally
    assert (whole.trained, whole.applied, whole.wasted) == (80, 64, {"released": 16})


def test_predictions_that_are_wrong_are_an_alarm_with_the_figures(running: World):
    for _ in range(3):
        running.set_speed("w1", 64 / 60)
        running.train_round(0.5)  # predicted 60 s, took 10 s

    row = worker(looked(running), "w1")

    assert row.books.duration_ratio == pytest.approx(1 / 6)
    assert row.books.duration_alarm.startswith(
        "Its tasks take 0.17 times as long as predicted"
    )
    assert "10 s, predicted 60 s" in row.books.duration_alarm
    assert row.books.spread == pytest.approx(0.7**3)


def test_what_is_in_force_goes_by_accepted_tokens(world: World):
    plan = msgspec.structs.replace(
        PLAN, warmup_tokens=64, schedule_tokens=640, second_stage_at=0.2
    )
    world.start_run(plan, token_budget=640)
    world.register()
    fresh = looked(world).training
    for _ in range(2):
        world.set_speed("w1", 64 / 60)
        world.train_round(0.5)  # 64 tokens

    later = looked(world).training

    assert (fresh.learning_rate, fresh.stage, fresh.stage_end_tokens) == (
        0.0,
        "warm-up",
        64,
    )
    assert (fresh.weight_decay, fresh.last_round) == (0.1, None)
    assert later.learning_rate == pytest.approx(0.667 * 2e-3)
    assert (later.stage, later.stage_end_tokens) == ("second stage", 640)
    assert (later.peak_rate, later.second_stage_tokens) == (2e-3, 128)
    assert (later.weight_decay, later.constant_reason) == (0.0, None)
    assert (later.round_kind, later.aggregation) == ("delta", "rounds")
    assert (later.local_optimiser, later.codec) == ("muon", "fp32")
    assert later.broadcast == "exact"


def test_a_run_that_is_too_short_for_a_schedule_says_why_its_rate_stays(world: World):
    plan = msgspec.structs.replace(PLAN, schedule_tokens=0)
    world.start_run(plan, token_budget=200_000)

    training = looked(world).training

    assert (training.stage, training.stage_end_tokens) == ("warm-up", 100_000)
    assert training.second_stage_tokens is None
    assert training.constant_reason.startswith("The run is too short for a schedule")


def test_the_last_round_is_told_by_what_its_version_was_made_of(running: World):
    for name in ("w2", "w3"):
        running.register(name)
    running.train_round(0.5)
    running.set_speed("w1", 64 / 60)
    held = [running.claimed(name) for name in ("w1", "w2", "w3")]
    for name, task, num_steps in zip(("w1", "w2", "w3"), held, (1, 3, 4), strict=True):
        running.submit(task, name, num_steps=num_steps)
    before = looked(running).training.last_round
    assert running.close_round()

    last = looked(running).training.last_round

    assert (before.tokens, before.num_steps) == (64, 4)
    assert (last.tokens, last.num_steps) == (16 + 48 + 64, 3)
    assert last.payload_bytes == 3 * before.payload_bytes > 3 * 4 * NUM_PARAMS


def test_a_rollback_is_not_the_last_round(running: World):
    running.train_round(0.5)
    before = looked(running).training.last_round
    running.change_run(roll_back_to=1)
    assert running.close_round()

    view = looked(running)

    assert (view.run.newest_version, view.training.last_round) == (3, before)


def test_a_gradient_round_has_neither_local_optimiser_nor_local_steps(world: World):
    world.start_run(msgspec.structs.replace(PLAN, round_kind=RoundKind.GRADIENT))
    world.register()
    world.train_round(0.5)

    training = looked(world).training

    assert (training.round_kind, training.local_optimiser) == ("gradient", None)
    assert (training.last_round.tokens, training.last_round.num_steps) == (64, None)


def test_history_is_left_out_of_updates(running: World):
    running.train_round(0.5)

    full, short = looked(running), looked(running, history=False)

    assert [point.version for point in full.versions] == [1, 2]
    assert (full.versions[0].train_loss, full.versions[0].tokens_per_s) == (None, None)
    assert full.versions[1].train_loss == 2.5
    assert (short.versions, short.evaluations) == ([], [])
    assert short.run == full.run


def test_a_score_is_in_the_history_and_names_the_best(world: World):
    world.start_run(scored=True, seeded=False)
    world.register()
    world.score(world.claimed(), nats=186.0)

    view = looked(world)

    assert view.run.best_version == 1
    (point,) = view.evaluations
    assert (point.version, point.loss) == (1, 2.0)
    # The figures of `/metrics` need the newest, and no more of the history.
    assert looked(world, history=False).evaluations == [point]


def test_tasks_that_were_given_up_are_named_newest_first(running: World):
    for _ in range(7):
        for _ in range(5):
            running.fail(task := running.claimed())
            running.clock.advance(60.0)
    view = looked(running)

    assert view.tasks.failed == 7
    assert len(view.tasks.latest_failed) == 5
    newest = view.tasks.latest_failed[0]
    assert (newest.task_id, newest.attempt) == (task.task_id, 5)
    assert newest.reason == "out_of_memory: too large"


def test_a_reset_shows_until_it_is_acknowledged(running: World):
    running.change_run(reset_from_version=7, reset_acknowledged=False)
    assert looked(running).run.reset_from_version == 7

    running.change_run(reset_acknowledged=True)
    assert looked(running).run.reset_from_version is None


def five_rounds(world: World) -> None:
    world.change_run(token_budget=320 + 640)
    for _ in range(5):
        world.set_speed("w1", 64 / 60)
        world.train_round(0.5)
    assert None not in (looked(world).run.eta.at, looked(world).run.tokens_per_s)


def test_a_finished_run_has_neither_eta_nor_speed(running: World):
    five_rounds(running)
    running.change_run(state="finished")

    run = looked(running).run

    assert (run.eta.at, run.eta.reason) == (None, "The run is finished.")
    assert run.tokens_per_s is None


def test_without_a_coordinator_there_is_neither_eta_nor_speed(running: World):
    five_rounds(running)
    at_rest = _AtRest(manifest=running.fleet.manifest, heartbeat_s=5.0)

    run = looked(running, known=at_rest).run

    assert (run.eta.at, run.eta.reason) == (None, "No coordinator runs.")
    assert run.tokens_per_s is None


def test_the_numbers_behind_a_verdict_are_there_to_be_read(running: World):
    running.set_speed("w1", 8.0)
    task = running.claimed()
    running.clock.advance(10.0)
    running.heartbeat(task, tokens_done=120, cpu_s=3.0)
    running.clock.advance(2.0)
    running.heartbeat(task, tokens_done=120, cpu_s=3.0)
    running.clock.advance(3.0)
    running.heartbeat(task, tokens_done=120, cpu_s=7.5)
    running.clock.advance(2.0)

    facts = worker(looked(running), "w1").facts

    assert (facts.heartbeat_age_s, facts.heartbeat_s) == (2.0, 5.0)
    assert (facts.elapsed_s, facts.predicted_s) == (17.0, 60.0)
    assert (facts.tokens_done, facts.num_tokens) == (120, 480)
    assert (facts.progress_age_s, facts.cpu_s_since_progress) == (7.0, 4.5)
    assert facts.no_progress_s == 3.0
    running.submit(task)
    facts = worker(looked(running), "w1").facts
    assert (facts.tokens_done, facts.progress_age_s, facts.back_in_round) == (
        None,
        None,
        True,
    )


def test_a_worker_that_slept_is_not_stuck_for_what_was_before(running: World):
    task = running.claimed()
    # One without progress, a sleep, and the next two are still busy waking up.
    for wait_s in (5.0, 5.0, 20.0, 5.0):
        running.clock.advance(wait_s)
        running.heartbeat(task, tokens_done=1)
    assert worker(looked(running), "w1").verdict == "computing"

    running.clock.advance(4.9)
    running.heartbeat(task, tokens_done=1)

    assert worker(looked(running), "w1").verdict == "stuck"


def test_late_tasks_and_those_that_stand_still_are_counted_apart(running: World):
    for name in ("w2", "w3", "w4"):
        running.register(name)
    for name in ("w1", "w2", "w3", "w4"):
        running.set_speed(name, 1.0)
    slow, stuck, good = (running.claimed(name) for name in ("w1", "w2", "w3"))
    running.claimed("w4")  # and is never heard again
    for done in range(1, 17):
        running.clock.advance(5.0)
        running.heartbeat(slow, "w1", tokens_done=done)
        running.heartbeat(good, "w3", tokens_done=done)
        running.heartbeat(stuck, "w2", tokens_done=1)
        if done == 12:
            counts = looked(running).tasks
            assert (counts.soft_expired, counts.stuck) == (0, 2)
            running.submit(good, "w3")

    view = looked(running)

    words = {row.worker_id: row.verdict for row in view.workers}
    assert words == {"w1": "slow", "w2": "stuck", "w3": "waiting", "w4": "lost"}
    assert (view.tasks.soft_expired, view.tasks.stuck) == (1, 2)


def test_a_score_is_neither_leased_nor_soft_expired_nor_stuck(world: World):
    world.start_run(scored=True, seeded=False)
    world.register()
    world.set_speed("w1", 1000.0)
    task = world.claimed()
    words, counted = [], []
    for beat in range(1, 16):
        world.clock.advance(5.0)
        tokens = beat if beat < 10 else 9  # and hangs
        world.heartbeat(task, tokens_done=tokens)
        view = looked(world)
        words.append(worker(view, "w1").verdict)
        counted.append((view.tasks.leased, view.tasks.soft_expired, view.tasks.stuck))

    assert words[0] == "computing"
    assert set(words) >= {"slow", "stuck"}
    assert set(counted) == {(0, 0, 0)}


def test_a_worker_that_is_gone_says_so_and_its_task_does_not_count(running: World):
    running.claimed()
    running.write(
        lambda c: workers.change_worker(c, "w1", draining=True, gone_at=START)
    )

    view = looked(running)

    assert worker(view, "w1").verdict == "gone"
    assert (view.tasks.soft_expired, view.tasks.stuck) == (0, 0)


def test_a_worker_that_stopped_is_gone_until_it_starts_again(running: World):
    running.heartbeat(phase="stopping")
    running.clock.advance(31.0)
    row = worker(looked(running), "w1")
    assert (row.verdict, row.evidence[:8]) == ("gone", "Stopped.")

    running.register("w1")

    assert worker(looked(running), "w1").verdict == "idle"


def test_a_worker_that_stops_with_a_task_in_hand_is_lost_when_it_falls_silent(
    running: World,
):
    task = running.claimed()
    running.heartbeat(task, phase="stopping")
    assert worker(looked(running), "w1").verdict == "computing"

    running.clock.advance(31.0)

    assert worker(looked(running), "w1").verdict == "lost"


def test_a_draining_worker_shows_it(running: World):
    running.write(lambda c: workers.change_worker(c, "w1", draining=True))

    row = worker(looked(running), "w1")
    assert (row.verdict, row.draining) == ("draining", True)


def test_nothing_that_opens_a_door_is_ever_in_the_view(running: World):
    task = running.claimed("w1", "c-secret-claim")

    shown = msgspec.json.encode(looked(running)).decode()

    row = running.task(task.task_id)
    for secret in (task.lease_id, row.lease_hash, "c-secret-claim", "s" * 32):
        assert secret not in shown
    assert task.task_id in shown
