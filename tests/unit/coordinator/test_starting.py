"""Before the first request: disk and database agree, or there is no start."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from sqlalchemy import select

from bitnet_ext.layout import layout_hash, num_params, preset_shape
from bitnet_ext.wire.verdicts import ErrorCode
from coordinator.domain.errors import RefusedError, StartError
from coordinator.domain.initial import initial_weights
from coordinator.domain.manifest import ManifestError
from coordinator.domain.plan import TrainingPlan, scheduled
from coordinator.service.grace import extend_leases
from coordinator.service.starting import (
    RunSettings,
    ensure_run,
    load_corpus,
    reconcile,
)
from coordinator.service.sweeping import keep_clock
from coordinator.store import runs, tasks, versions
from coordinator.store.blobs import BlobKind, version_blob
from coordinator.store.tables import events, submissions
from coordinator.store.tables import runs as runs_table
from tests.fakes import START, MadeToFailError
from tests.unit.coordinator.fleets import PLAN, SHAPE, World, write_corpus

TINY = preset_shape("tiny", vocab_size=SHAPE.vocab_size)
SETTINGS = RunSettings(preset="tiny", seed=3, plan=PLAN)


def quickly(shape, seed):
    """First weights that take no time: all the same number."""
    return np.full(num_params(shape), 0.25, dtype=np.float32)


def make_run(world, settings=SETTINGS):
    return ensure_run(world.fleet, world.fleet.manifest, settings, quickly)


def blob(world, kind, version):
    return world.fleet.blobs.path(kind, version_blob(version))


def leave_orphan(world):
    path = blob(world, BlobKind.STATE, 77)
    path.write_bytes(b"orphan")
    return path


# -- making the run ------------------------------------------------------------


def test_a_run_is_made_once(world: World):
    assert make_run(world)
    assert not make_run(world)

    run = world.run_row()
    assert (run.state, run.preset, run.seed, run.root_version) == (
        "running",
        "tiny",
        3,
        1,
    )
    assert run.layout_hash == layout_hash(TINY).hex()
    assert run.corpus_hash == world.fleet.the_manifest().corpus_sha256
    assert run.token_budget == 20 * num_params(TINY)
    plan = scheduled(PLAN, run.token_budget)
    assert msgspec.json.decode(run.plan_json, type=TrainingPlan) == plan
    assert (run.reset_from_version, run.reset_acknowledged) == (None, True)
    live = world.live_round()
    assert (live.base_version, live.state) == (1, "open")
    assert world.read(lambda c: tasks.evaluations_open(c, run.run_id)) == {1}


def test_a_budget_that_is_set_is_kept(world: World):
    make_run(world, RunSettings(preset="tiny", seed=3, plan=PLAN, token_budget=5))

    assert world.run_row().token_budget == 5


@pytest.mark.parametrize(
    ("budget", "due"),
    [
        (200_000, "stays at its peak after the warm-up. The run is too short"),
        (200_001, "falls to zero at 200001 accepted tokens"),
    ],
)
def test_the_log_says_what_becomes_of_the_rate_of_a_run(
    world: World, caplog, budget, due
):
    caplog.set_level("INFO", logger="coordinator.service.starting")

    make_run(world, RunSettings(preset="tiny", seed=3, plan=PLAN, token_budget=budget))

    (line,) = (
        record.getMessage()
        for record in caplog.records
        if getattr(record, "event", None) == "run.started"
    )
    assert line.startswith(f"run made: its learning rate {due}")


@pytest.mark.parametrize("budget", [0, 200_001])
def test_a_schedule_that_ends_before_its_run_is_refused(world: World, budget):
    plan = TrainingPlan(warmup_tokens=10, schedule_tokens=200_000)
    settings = RunSettings(preset="tiny", seed=3, plan=plan, token_budget=budget)

    with pytest.raises(StartError, match=r"SCHEDULE_TOKENS: .*\(200000\) must"):
        make_run(world, settings)


def test_a_schedule_may_end_with_its_run(world: World):
    plan = TrainingPlan(warmup_tokens=10, schedule_tokens=200_000)

    make_run(world, RunSettings(preset="tiny", seed=3, plan=plan, token_budget=200_000))

    stored = msgspec.json.decode(world.run_row().plan_json, type=TrainingPlan)
    assert stored == plan


def test_a_schedule_that_nobody_set_ends_with_its_run(world: World):
    plan = TrainingPlan(warmup_tokens=10)

    make_run(world, RunSettings(preset="tiny", seed=3, plan=plan, token_budget=200_000))

    stored = msgspec.json.decode(world.run_row().plan_json, type=TrainingPlan)
    assert stored == msgspec.structs.replace(plan, schedule_tokens=200_000)


def test_the_first_weights_come_from_the_seed(world: World):
    ensure_run(world.fleet, world.fleet.manifest, SETTINGS)

    state = world.state(1)
    np.testing.assert_array_equal(state.weights, initial_weights(TINY, 3))
    assert not state.momentum.any()


def test_without_a_corpus_there_is_no_run(world: World):
    world.fleet.manifest = None

    assert not make_run(world)
    assert world.read(runs.newest_run) is None


@pytest.mark.parametrize("ordinal", [1, 4, 7, 8, 12, 18])
def test_after_a_crash_the_run_is_made_anew(world: World, ordinal):
    with world.fs.crashing(ordinal), pytest.raises(MadeToFailError):
        make_run(world)

    reconcile(world.fleet)
    assert world.blobs() == {}
    assert make_run(world)
    assert world.run_row().root_version == 1


def test_the_manifest_is_read_where_there_is_one(world: World, tmp_path: Path):
    assert load_corpus(world.fleet.corpus) == world.fleet.manifest
    assert load_corpus(tmp_path / "nowhere") is None


def test_a_damaged_manifest_stops_the_start(world: World):
    path = world.fleet.corpus / "tokenized/manifest.json"
    path.write_text("{}")

    with pytest.raises(ManifestError, match=r"manifest\.json"):
        load_corpus(world.fleet.corpus)


# -- what a crash left ---------------------------------------------------------


def test_orphans_go_and_everything_with_a_row_stays(running: World):
    running.train_round(0.5)
    running.submit(running.claimed())
    before = running.blobs()
    for kind in BlobKind:
        running.fleet.blobs.path(kind, ".tmp-0123").write_bytes(b"half")
        running.fleet.blobs.path(kind, "v0000000077.frame").write_bytes(b"orphan")

    reconcile(running.fleet)

    assert running.blobs() == before
    assert len(before) == 6  # two versions of two blobs, two payloads


def test_a_folder_among_the_blobs_is_left_alone(running: World):
    path = running.fleet.blobs.path(BlobKind.PUBLISHED, "lost+found")
    path.mkdir()

    reconcile(running.fleet)

    assert path.is_dir()
    assert "lost+found" not in running.fleet.blobs.names(BlobKind.PUBLISHED)


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[:-1])
    else:
        path.write_bytes(content[:-40] + bytes([content[-40] ^ 1]) + content[-39:])


@pytest.mark.parametrize(
    ("how", "why"),
    [("missing", "No such file"), ("cut", "must have"), ("flipped", "SHA-256")],
)
@pytest.mark.parametrize("kind", [BlobKind.PUBLISHED, BlobKind.STATE])
def test_a_damaged_newest_version_stops_the_start_and_nothing_changes(
    running: World, kind, how, why
):
    running.train_round(0.5)
    damage(blob(running, kind, 2), how)
    leave_orphan(running)
    before = running.everything()

    with pytest.raises(StartError) as caught:
        reconcile(running.fleet)

    assert caught.value.exit_code == 4
    assert "version 2 is damaged" in str(caught.value)
    assert why in str(caught.value)
    assert f"{kind}/{version_blob(2)}" in str(caught.value)
    assert "whole: 1." in str(caught.value)
    assert running.everything() == before


def test_the_last_good_version_may_be_further_back_or_nowhere(running: World):
    for _ in range(2):
        running.train_round(0.5)
    for version in (2, 3):
        damage(blob(running, BlobKind.STATE, version), "cut")
    with pytest.raises(StartError, match="whole: 1"):
        reconcile(running.fleet)

    damage(blob(running, BlobKind.PUBLISHED, 1), "cut")
    with pytest.raises(StartError, match="whole: none"):
        reconcile(running.fleet)


def test_an_older_damaged_version_does_not_stop_the_start(running: World):
    running.train_round(0.5)
    damage(blob(running, BlobKind.STATE, 1), "flipped")

    reconcile(running.fleet)


def test_looking_at_the_data_folder_moves_no_lease(running: World):
    running.claimed()
    running.clock.advance(29.0)
    before = running.everything()

    reconcile(running.fleet)

    assert running.everything() == before


def test_every_lease_gets_time_to_be_renewed(running: World):
    task = running.claimed()
    running.clock.advance(1000.0)

    extend_leases(running.fleet)

    assert running.task(task.task_id).expires_at == START + 1030.0
    assert running.heartbeat(task, tokens_done=1).lease == "held"


def test_the_time_to_renew_goes_by_the_heartbeat_of_each_worker(running: World):
    running.register("w1", heartbeat_s=60.0)
    running.register("w2")
    slow, usual = running.claimed("w1"), running.claimed("w2")
    running.clock.advance(29.0)

    extend_leases(running.fleet)

    now = running.clock.now()
    assert running.task(slow.task_id).expires_at == now + 6 * 60.0
    assert running.task(usual.task_id).expires_at == now + 30.0


def test_a_time_away_does_not_count_against_the_hard_limit(running: World):
    running.do(keep_clock(running.fleet))
    running.register("w1", heartbeat_s=60.0)
    running.set_speed("w1", 8.0)
    task = running.claimed()  # 480 tokens, 60 s: a limit of 240 s
    running.clock.advance(239.0)

    extend_leases(running.fleet)

    assert running.task(task.task_id).hard_at == START + 240.0 + 239.0


def test_many_starts_give_a_lease_no_more_than_the_time_away(running: World):
    running.set_speed("w1", 8.0)
    task = running.claimed()  # a limit of 240 s
    for beats in range(1, 100):
        running.do(keep_clock(running.fleet))
        running.clock.advance(5.0)
        extend_leases(running.fleet)
        running.clock.advance(15.0)
        if running.heartbeat(task, bytes_done=beats).lease == "lost":
            break

    assert running.clock.now() - START == 240.0 + 16 * 5.0


def test_a_clock_that_jumps_ahead_over_a_restart_makes_nobody_lost(running: World):
    running.register("w2")
    running.clock.advance(40.0)
    running.heartbeat(worker_id="w1")
    running.do(keep_clock(running.fleet))
    running.clock.advance(3600.0)

    extend_leases(running.fleet)

    ages = [running.clock.now() - running.worker(w).heartbeat_at for w in ("w1", "w2")]
    # What was silence before is silence still: w2 is lost.
    assert ages == [0.0, 40.0]


def test_a_second_start_at_once_changes_nothing(running: World):
    running.train_round(0.5)
    running.claimed()
    reconcile(running.fleet)
    extend_leases(running.fleet)
    before = running.everything()

    reconcile(running.fleet)
    extend_leases(running.fleet)

    assert running.everything() == before


# -- hard reset ----------------------------------------------------------------


@pytest.fixture
def unfinished(running: World) -> World:
    """Version 2, one submission accepted but not applied, one lease out."""
    running.train_round(0.5)
    running.register("w2")
    running.held = running.claimed("w2")
    running.submit(running.claimed("w1"), "w1")
    return running


def test_another_layout_starts_a_new_run_at_the_next_number(unfinished: World):
    assert make_run(unfinished)

    run = unfinished.run_row()
    assert run.root_version == 3
    assert (run.reset_from_version, run.reset_acknowledged) == (2, False)
    assert (run.state, run.epoch, run.tokens_accepted) == ("running", 0, 0)
    assert unfinished.live_round().base_version == 3
    assert unfinished.read(lambda c: versions.find_version(c, 3)).parent is None
    assert (unfinished.state(3).weights == 0.25).all()


def test_the_old_run_is_finished_and_its_blobs_are_kept(unfinished: World):
    before = unfinished.blobs()

    make_run(unfinished)
    reconcile(unfinished.fleet)

    old = unfinished.read(
        lambda c: c.execute(
            select(runs_table.c.state).where(runs_table.c.run_id == "r-1")
        ).scalar_one()
    )
    assert old == "finished"
    assert unfinished.blobs().items() >= before.items()
    assert unfinished.read(lambda c: runs.range_tokens(c, "r-1")) == 0
    kinds = unfinished.read(lambda c: [e.kind for e in c.execute(select(events))])
    assert kinds[-2:] == ["run.reset", "run.started"]


def test_what_was_accepted_is_filtered_and_what_was_out_is_lost(unfinished: World):
    task = unfinished.held

    make_run(unfinished)

    rows = unfinished.read(lambda c: list(c.execute(select(submissions))))
    assert [(r.state, r.reason) for r in rows] == [
        ("applied", None),
        ("filtered", "reset"),
    ]
    held = unfinished.task(task.task_id)
    assert (held.state, held.reason) == ("failed", "hard reset")
    assert unfinished.heartbeat(task, "w2").lease == "lost"
    with pytest.raises(RefusedError) as caught:
        unfinished.submit(task, "w2")
    assert caught.value.code is ErrorCode.LEASE_LOST
    assert not unfinished.close_round()


def test_a_crash_in_a_reset_leaves_the_old_run_as_it_was(unfinished: World):
    before = unfinished.everything()
    with unfinished.fs.crashing(14), pytest.raises(MadeToFailError):
        make_run(unfinished)

    reconcile(unfinished.fleet)

    assert unfinished.everything() == before
    assert make_run(unfinished)
    assert unfinished.run_row().root_version == 3


def test_a_reset_happens_once(unfinished: World):
    make_run(unfinished)

    assert not make_run(unfinished)


def test_another_corpus_is_refused_and_nothing_changes(world: World):
    make_run(world)
    world.fleet.manifest = write_corpus(world.fleet.corpus, sizes=(999,))
    before = world.everything()

    with pytest.raises(StartError, match="put the first one back") as caught:
        make_run(world)

    assert caught.value.exit_code == 2
    assert world.everything() == before


@pytest.mark.parametrize("preset", ["tiny", "small", None])
def test_a_corpus_with_another_vocabulary_never_ends_a_run(world: World, preset):
    make_run(world)
    run = world.run_row()
    world.fleet.manifest = write_corpus(world.fleet.corpus, vocab_size=24)
    before = world.everything()

    with pytest.raises(StartError, match="another data folder") as caught:
        make_run(world, replace(SETTINGS, preset=preset))

    assert caught.value.exit_code == 2
    for hashed in (run.corpus_hash, world.fleet.the_manifest().corpus_sha256):
        assert hashed[:12] in str(caught.value)
    assert world.everything() == before


def test_a_run_that_no_longer_fits_is_kept_until_a_preset_is_named(running: World):
    before = running.everything()

    with pytest.raises(StartError, match="BITNET_COORD_PRESET") as caught:
        make_run(running, replace(SETTINGS, preset=None))

    assert caught.value.exit_code == 2
    assert running.everything() == before


def test_a_run_whose_corpus_is_gone_stops_the_start(world: World):
    make_run(world)
    world.fleet.manifest = None
    before = world.everything()

    with pytest.raises(StartError, match="put it back") as caught:
        make_run(world)

    assert str(world.fleet.corpus) in str(caught.value)
    assert world.everything() == before


def test_a_preset_that_nobody_set_is_that_of_the_run(world: World):
    make_run(world)

    assert not make_run(world, RunSettings(preset=None, seed=3, plan=PLAN))

    assert world.run_row().preset == "tiny"
