"""What the page is sent: everything once, then only what differs."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from coordinator.service.feed import MOST_GAP_S, Feed, difference, gap_s
from coordinator.service.lag import LoopLag
from coordinator.service.returning import sweep_leases
from coordinator.service.view import ServerView
from tests.unit.coordinator.fleets import World


@pytest.fixture
def feed(running: World) -> Feed:
    return made(running)


def made(world, *, is_watched=lambda: True):
    return Feed(
        world.fleet,
        LoopLag(world.clock),
        insecure_http=False,
        is_watched=is_watched,
    )


def looked(world, feed):
    return world.do(feed.snapshot())


def body_of(update):
    """Return what is sent of an update; None for no update."""
    return None if update is None else msgspec.to_builtins(update)


def ageless(row):
    """Return a worker without what only time changes: no update is sent for it."""
    ages = {"heartbeat_age_s", "elapsed_s", "progress_age_s"}
    facts = {name: fact for name, fact in row["facts"].items() if name not in ages}
    return row | {"facts": facts}


def updates(world):
    return [body_of(body) for kind, body in world.told if kind == "fleet.updated"]


def test_the_first_update_holds_everything(running: World, feed: Feed):
    view = looked(running, feed)

    sent = body_of(difference(None, view))

    whole = msgspec.to_builtins(view)
    history = {"package_version", "insecure_http", "versions", "evaluations"}
    assert sent == {name: whole[name] for name in whole.keys() - history}


def test_nothing_new_is_no_update(running: World, feed: Feed):
    view = looked(running, feed)

    assert difference(view, view) is None


def test_the_lag_of_the_server_alone_is_no_news(running: World, feed: Feed):
    view = looked(running, feed)
    later = msgspec.structs.replace(view, server=ServerView(loop_lag_ms=99.0))

    assert difference(view, later) is None


def test_that_time_goes_by_is_no_news(running: World, feed: Feed):
    task = running.claimed()
    running.heartbeat(task, tokens_done=8)
    before = looked(running, feed)
    running.clock.advance(1.0)
    after = looked(running, feed)

    assert before.workers != after.workers
    assert difference(before, after) is None


def test_who_looks_first_after_a_sleep_finds_nobody_lost(running: World, feed: Feed):
    running.claimed()
    running.do(sweep_leases(running.fleet))
    running.clock.advance(300.0)

    view, dump = looked(running, feed), running.do(feed.telemetry())

    assert [row.verdict for row in view.workers] == ["computing"]
    assert [row.verdict for row in dump.fleet.workers] == ["computing"]


def test_only_what_changed_is_sent_and_the_lag_goes_along(running: World, feed: Feed):
    running.register("w2")
    before = looked(running, feed)
    running.heartbeat(worker_id="w2", phase="idle")
    running.clock.advance(1.0)
    running.heartbeat(worker_id="w2", phase="idle")
    after = looked(running, feed)

    sent = body_of(difference(before, after))

    assert sorted(sent) == ["server", "workers"]
    assert [worker["worker_id"] for worker in sent["workers"]] == ["w2"]
    assert sent["server"] == msgspec.to_builtins(after.server)


def test_a_claim_changes_round_tasks_and_its_worker(running: World, feed: Feed):
    running.register("w2")
    before = looked(running, feed)
    running.claimed("w1")

    sent = body_of(difference(before, looked(running, feed)))

    assert sorted(sent) == ["round", "server", "tasks", "workers"]
    assert [lane["worker_id"] for lane in sent["round"]["lanes"]] == ["w1"]
    assert sent["tasks"]["leased"] == 1
    assert [worker["worker_id"] for worker in sent["workers"]] == ["w1"]


def test_of_many_lanes_only_those_that_have_changed_are_sent(
    running: World, feed: Feed
):
    names = [f"w{number}" for number in range(20)]
    for name in names:
        running.register(name)
    held = {name: running.claimed(name) for name in names[:-1]}
    before = looked(running, feed)
    running.heartbeat(held["w7"], "w7", tokens_done=16)
    running.claimed(names[-1])
    after = looked(running, feed)

    sent = body_of(difference(before, after))

    assert "round" not in sent
    assert [lane["worker_id"] for lane in sent["lanes"]] == ["w7", names[-1]]
    assert [row["worker_id"] for row in sent["workers"]] == [names[-1], "w7"]
    assert len(msgspec.json.encode(sent)) < len(msgspec.json.encode(after)) / 5


def test_a_round_that_differs_in_more_than_lanes_is_sent_whole(
    running: World, feed: Feed
):
    task = running.claimed()
    before = looked(running, feed)
    running.submit(task)

    sent = body_of(difference(before, looked(running, feed)))

    assert sent["round"]["state"] == "closing"
    assert [lane["outcome"] for lane in sent["round"]["lanes"]] == ["back"]
    assert "lanes" not in sent


def test_a_lane_that_counts_no_more_is_gone_from_the_round_that_is_sent(
    running: World, feed: Feed
):
    running.register("w2")
    task = running.claimed("w1")
    running.claimed("w2")
    before = looked(running, feed)
    view = msgspec.structs.replace(
        before.round,
        lanes=[lane for lane in before.round.lanes if lane.worker_id != "w1"],
    )
    after = msgspec.structs.replace(before, round=view)

    sent = body_of(difference(before, after))

    assert task is not None
    assert [lane["worker_id"] for lane in sent["round"]["lanes"]] == ["w2"]


@pytest.mark.parametrize(("look_s", "due_s"), [(0.001, 0.5), (0.02, 0.5), (0.1, 1.9)])
def test_looks_take_a_twentieth_of_the_time_at_most(look_s, due_s):
    assert gap_s(look_s) == pytest.approx(due_s)
    assert look_s <= 0.05 * (look_s + gap_s(look_s)) + 1e-9


def test_a_look_that_was_held_up_does_not_stop_the_feed_for_long():
    assert gap_s(60.0) == MOST_GAP_S  # a machine that slept in the middle of it


def test_the_feed_waits_longer_after_a_look_that_took_longer(running: World):
    pauses = []

    async def pause(seconds):
        pauses.append(seconds)
        raise asyncio.CancelledError

    feed = Feed(
        running.fleet,
        LoopLag(running.clock),
        insecure_http=False,
        is_watched=lambda: running.clock.advance(1.0) or True,
        pause=pause,
    )

    async def story():
        running.fleet.changed.ring()
        looking = asyncio.ensure_future(feed.run())
        await asyncio.sleep(0)
        running.fleet.changed.ring()
        await asyncio.wait([looking])

    running.do(story())

    assert pauses == [pytest.approx(19.0)]


def test_what_is_gone_is_sent_as_null(world: World):
    feed = made(world)
    before = looked(world, feed)
    world.start_run()

    sent = body_of(difference(before, looked(world, feed)))

    assert before.missing
    assert sent["missing"] is None
    assert sent["run"]["run_id"] == "r-1"


def test_updates_put_together_are_the_view(running: World, feed: Feed):
    running.register("w2")
    last, known, workers = None, {}, {}
    for act in (
        lambda: None,
        lambda: running.claimed("w1"),
        lambda: running.clock.advance(3.0),
        lambda: running.heartbeat(phase="idle"),
        lambda: running.claimed("w2"),
        lambda: running.clock.advance(40.0),
        lambda: running.do(sweep_leases(running.fleet)),
        lambda: running.train_round(0.5, 0.5),
    ):
        act()
        view = looked(running, feed)
        sent = body_of(difference(last, view)) or {}
        for row in sent.pop("workers", []):
            workers[row["worker_id"]] = row
        lanes = {lane["worker_id"]: lane for lane in sent.pop("lanes", [])}
        known |= sent
        if lanes:
            held = {lane["worker_id"]: lane for lane in known["round"]["lanes"]} | lanes
            known["round"] = known["round"] | {"lanes": list(held.values())}
        last = view

        whole = msgspec.to_builtins(view)
        assert list(map(ageless, workers.values())) == list(
            map(ageless, whole["workers"])
        )
        assert {name: whole[name] for name in known} == known


def test_the_feed_publishes_once_for_each_change(running: World, feed: Feed):
    running.do(feed.update())
    running.do(feed.update())
    running.claimed()
    running.do(feed.update())
    running.do(feed.update())

    first, second = updates(running)
    assert first["run"]["run_id"] == "r-1"
    assert "run" not in second
    assert second["tasks"]["leased"] == 1


def test_while_nobody_watches_nothing_is_looked_at_and_then_all_is_sent(running: World):
    watching = [True]
    feed = made(running, is_watched=lambda: watching[0])
    running.do(feed.update())
    watching[0] = False
    running.claimed()
    # A look would fail: there is nothing to read from any more.
    store, running.fleet.store = running.fleet.store, None
    running.do(feed.update())
    running.fleet.store = store
    assert len(updates(running)) == 1
    watching[0] = True

    running.do(feed.update())

    first, second = updates(running)
    assert sorted(second) == sorted(first)
    assert second["tasks"]["leased"] == 1


def test_an_update_holds_no_history_and_a_snapshot_does(running: World, feed: Feed):
    running.train_round(0.5)

    snapshot = looked(running, feed)

    assert [point.version for point in snapshot.versions] == [1, 2]
    running.do(feed.update())
    assert "versions" not in updates(running)[-1]


def test_after_a_sleep_of_the_coordinator_nobody_is_called_lost(
    running: World, feed: Feed
):
    running.do(sweep_leases(running.fleet))
    running.clock.advance(60.0)

    (row,) = looked(running, feed).workers

    assert row.verdict == "idle"


def test_a_ring_makes_the_feed_look(running: World, feed: Feed):
    async def story():
        task = asyncio.ensure_future(feed.run())
        while not task.done() and not updates(running):
            running.fleet.changed.ring()
            await asyncio.sleep(0)
            await running.fleet.store.read(lambda c: None)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    running.do(asyncio.wait_for(story(), 10.0))

    assert len(updates(running)) == 1
