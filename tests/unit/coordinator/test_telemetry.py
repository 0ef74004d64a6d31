"""What an expert is told of a fleet, and what nobody is."""

from __future__ import annotations

import msgspec
import pytest

from coordinator.domain.plan import TrainingPlan
from coordinator.login.passwords import reset_admin_password
from coordinator.service.telemetry import NUM_EVENTS, Telemetry, collect
from coordinator.store import runs, workers
from coordinator.store.sessions import find_password_hash
from coordinator.store.tables import metadata, sessions
from tests.unit.coordinator.fleets import SECRET, World


def dumped(world: World) -> Telemetry:
    now = world.clock.now()
    return world.read(lambda c: collect(c, world.fleet, now=now))


def test_the_story_of_a_round_is_there_with_its_times(running: World):
    running.register("w2")
    first, second = running.claimed("w1"), running.claimed("w2")
    running.clock.advance(5.0)
    running.heartbeat(second, "w2", tokens_done=8, cpu_s=4.0)
    running.submit(first)

    found = dumped(running)

    (lease,) = found.leases
    assert (lease.task_id, lease.lease_worker_id) == (second.task_id, "w2")
    assert (lease.tokens_done, lease.progress_cpu_s) == (8, 4.0)
    assert lease.expires_at - found.at == 30.0
    (sent,) = found.submissions
    assert (sent.worker_id, sent.accepted_at - sent.claimed_at) == ("w1", 5.0)
    assert (sent.compute_s, sent.download_s, sent.state) == (1.0, 0.1, "accepted")
    assert [claim.outcome for claim in found.claims] == ["back", None]
    assert [live.round_id for live in found.rounds] == [1]
    verdicts = {row.worker_id: row.verdict for row in found.fleet.workers}
    assert verdicts == {"w1": "waiting", "w2": "computing"}
    assert [row.worker_id for row in found.workers] == ["w1", "w2"]
    assert found.plan.round_s == 60.0


def test_failures_and_events_are_there_with_their_reasons(running: World):
    for _ in range(5):
        running.fail(running.claimed())
        running.clock.advance(60.0)

    found = dumped(running)

    (failed,) = found.failed
    assert (failed.attempt, failed.reason) == (5, "out_of_memory: too large")
    assert failed.done_at == found.at - 60.0
    assert [event.kind for event in found.events].count("lease.failed") == 5
    assert found.events[-1].body["task_id"] == failed.task_id
    # A round that starts over voids its claims: here they are still told.
    assert [claim.outcome for claim in found.claims] == ["void"] * 5


def test_the_newest_events_are_told_in_order(running: World):
    for number in range(NUM_EVENTS + 5):
        running.write(
            lambda c, n=number: workers.add_event(c, at=1.0, kind="x", body={"n": n})
        )

    told = [event.body["n"] for event in dumped(running).events]

    assert told == list(range(5, NUM_EVENTS + 5))


def test_without_a_run_there_is_little_to_tell(world: World):
    found = dumped(world)

    assert (found.plan, found.rounds, found.leases, found.failed) == (None, [], [], [])


def test_without_the_corpus_everything_else_is_told(running: World):
    running.fleet.manifest = None

    run = dumped(running).fleet.run

    assert (run.epoch_tokens, run.gzip_bits_per_byte) == (None, None)
    assert run.run_id == "r-1"


def test_what_opens_a_door_is_never_told(running: World):
    running.write(lambda c: reset_admin_password(c, "the-admin-password"))
    running.write(lambda c: workers.server_secret(c, SECRET))
    running.write(
        lambda c: c.execute(
            sessions.insert().values(
                session_hash="a" * 64, operator="admin", created_at=1.0, seen_at=1.0
            )
        )
    )
    running.register("w2")
    held = running.claimed("w1", "c-secret-claim")
    running.submit(running.claimed("w2", "c-other-claim"), "w2")
    row = running.task(held.task_id)

    shown = msgspec.json.encode(dumped(running)).decode()

    for secret in (
        held.lease_id,
        row.lease_hash,
        "c-secret-claim",
        "c-other-claim",
        "the-admin-password",
        running.read(find_password_hash),
        SECRET.hex(),
        SECRET.decode(),
        "a" * 64,
    ):
        assert secret not in shown
    assert held.task_id in shown


@pytest.mark.parametrize("table", ["secrets", "sessions", "facts", "worker_logs"])
def test_whole_tables_are_never_read_for_it(running: World, table):
    """Not even to be left out later: the table can be gone."""
    running.write(lambda c: metadata.tables[table].drop(c))

    dumped(running)

    running.write(lambda c: metadata.tables[table].create(c))


def test_it_can_be_read_back(running: World):
    running.train_round(0.5)
    found = dumped(running)

    assert msgspec.json.decode(msgspec.json.encode(found), type=Telemetry) == found
    assert isinstance(found.plan, TrainingPlan)
    assert running.read(runs.newest_run).run_id == found.fleet.run.run_id
