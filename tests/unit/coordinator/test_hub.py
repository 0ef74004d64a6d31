"""The hub: numbers, order, and what becomes of a client that is too slow."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from coordinator.live.hub import BACKLOG_MESSAGES, Event, Hub, Mark, Subscriber

Items = list[Event | Mark]
Waiting = Callable[[Subscriber], Items]


@pytest.fixture
def waiting() -> Iterator[Waiting]:
    """Return a function that takes everything that waits, and waits for no more."""

    async def take(subscriber: Subscriber) -> Items:
        items: Items = []
        while True:
            try:
                async with asyncio.timeout(0):
                    items.append(await subscriber.next())
            except TimeoutError:
                return items

    with asyncio.Runner() as runner:
        yield lambda subscriber: runner.run(take(subscriber))


def numbers(items: Items) -> list[Any]:
    return [item if isinstance(item, Mark) else item.seq for item in items]


def publish(hub: Hub, count: int) -> None:
    for _ in range(count):
        hub.publish("fleet.updated", {}, at=1.0)


def test_events_are_numbered_from_one_without_gaps(waiting: Waiting) -> None:
    hub = Hub()
    first = hub.subscribe()

    assert hub.seq == 0
    publish(hub, 3)

    assert hub.seq == 3
    assert numbers(waiting(first)) == [Mark.SNAPSHOT, 1, 2, 3]


def test_an_event_carries_kind_number_time_and_body(waiting: Waiting) -> None:
    hub = Hub()
    subscriber = hub.subscribe()

    hub.publish("version.published", {"version": 7}, at=12.5)

    event = waiting(subscriber)[1]
    assert isinstance(event, Event)
    assert msgspec.json.decode(event.text) == {
        "kind": "version.published",
        "seq": 1,
        "at": 12.5,
        "body": {"version": 7},
    }


def test_every_subscriber_gets_every_event(waiting: Waiting) -> None:
    hub = Hub()
    first, second = hub.subscribe(), hub.subscribe()

    publish(hub, 2)

    assert numbers(waiting(first)) == numbers(waiting(second)) == [Mark.SNAPSHOT, 1, 2]


def test_a_hub_is_watched_as_long_as_there_is_a_subscriber() -> None:
    hub = Hub()

    seen = [hub.is_watched]
    subscriber = hub.subscribe()
    seen.append(hub.is_watched)
    hub.unsubscribe(subscriber)

    assert [*seen, hub.is_watched] == [False, True, False]


def test_a_late_subscriber_starts_with_a_snapshot_and_gets_no_old_events(
    waiting: Waiting,
) -> None:
    hub = Hub()
    publish(hub, 5)

    late = hub.subscribe()
    publish(hub, 1)

    assert numbers(waiting(late)) == [Mark.SNAPSHOT, 6]


def test_nothing_is_offered_after_unsubscribing_twice(waiting: Waiting) -> None:
    hub = Hub()
    subscriber = hub.subscribe()

    hub.unsubscribe(subscriber)
    hub.unsubscribe(subscriber)
    publish(hub, 1)

    assert numbers(waiting(subscriber)) == [Mark.SNAPSHOT]


def test_a_backlog_holds_exactly_its_limit(waiting: Waiting) -> None:
    hub = Hub()
    subscriber = hub.subscribe()

    publish(hub, BACKLOG_MESSAGES - 1)  # and the snapshot mark

    assert numbers(waiting(subscriber)) == [
        Mark.SNAPSHOT,
        *range(1, BACKLOG_MESSAGES),
    ]


@pytest.mark.parametrize("extra", [0, 1, 1000])
def test_an_overflow_leaves_one_resync_mark_and_nothing_else(
    waiting: Waiting, extra: int
) -> None:
    hub = Hub()
    slow, quick = hub.subscribe(), hub.subscribe()
    assert numbers(waiting(quick)) == [Mark.SNAPSHOT]

    publish(hub, BACKLOG_MESSAGES)
    assert numbers(waiting(quick)) == list(range(1, BACKLOG_MESSAGES + 1))
    publish(hub, extra)

    assert numbers(waiting(slow)) == [Mark.RESYNC]


def test_after_an_overflow_events_start_again_with_the_next_snapshot(
    waiting: Waiting,
) -> None:
    hub = Hub()
    slow = hub.subscribe()
    publish(hub, BACKLOG_MESSAGES)
    assert numbers(waiting(slow)) == [Mark.RESYNC]

    publish(hub, 1)
    slow.want_snapshot()
    publish(hub, 2)

    next_seq = BACKLOG_MESSAGES + 2
    assert numbers(waiting(slow)) == [Mark.SNAPSHOT, next_seq, next_seq + 1]


def test_two_wishes_for_a_snapshot_make_one(waiting: Waiting) -> None:
    subscriber = Subscriber()

    subscriber.want_snapshot()
    subscriber.want_snapshot()

    assert numbers(waiting(subscriber)) == [Mark.SNAPSHOT]


def test_a_waiting_client_wakes_when_an_event_comes() -> None:
    async def story() -> Event | Mark:
        hub = Hub()
        subscriber = hub.subscribe()
        await subscriber.next()
        waiter = asyncio.create_task(subscriber.next())
        await asyncio.sleep(0)
        assert not waiter.done()
        publish(hub, 1)
        return await asyncio.wait_for(waiter, 5)

    item = asyncio.run(story())

    assert isinstance(item, Event)
    assert item.seq == 1
