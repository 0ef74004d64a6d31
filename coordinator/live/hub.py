"""Numbers the live events and hands each to every subscriber; never waits for one.

It knows neither HTTP nor websockets. Everything here runs on the event loop, one
call at a time.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import Final

import msgspec

#: Messages that may wait for one client before its backlog is dropped.
BACKLOG_MESSAGES: Final = 64


@dataclass(frozen=True, slots=True)
class Event:
    """One published event, already in the bytes that every client gets."""

    seq: int
    text: bytes


class Mark(Enum):
    """What may stand in a backlog besides events."""

    SNAPSHOT = "snapshot"  #: take a snapshot now; events above it follow
    RESYNC = "resync"  #: the backlog was dropped here


class Subscriber:
    """The backlog of one client: bounded, and told when something was lost."""

    def __init__(self, limit: int = BACKLOG_MESSAGES) -> None:
        self._limit = limit
        self._waiting: deque[Event | Mark] = deque([Mark.SNAPSHOT])
        self._behind = False
        self._filled = asyncio.Event()
        self._filled.set()

    def offer(self, event: Event) -> None:
        """Queue an event, or replace the whole backlog by one resync mark.

        After the mark nothing is queued until `want_snapshot`: a client that has
        lost events can use none of the later ones.
        """
        if self._behind:
            return
        if len(self._waiting) < self._limit:
            self._put(event)
            return
        self._behind = True
        self._waiting.clear()
        self._put(Mark.RESYNC)

    def want_snapshot(self) -> None:
        """Start over: a snapshot first, then the events published from now on."""
        self._behind = False
        self._waiting.clear()
        self._put(Mark.SNAPSHOT)

    def _put(self, item: Event | Mark) -> None:
        self._waiting.append(item)
        self._filled.set()

    async def next(self) -> Event | Mark:
        """Return the oldest item, once there is one."""
        while not self._waiting:
            self._filled.clear()
            await self._filled.wait()
        return self._waiting.popleft()


class Hub:
    """All subscribers, and the number of the last event."""

    def __init__(self) -> None:
        self._subscribers: set[Subscriber] = set()
        self._seq = 0

    @property
    def seq(self) -> int:
        """Number of the last published event; 0 before the first."""
        return self._seq

    @property
    def is_watched(self) -> bool:
        """Whether there is a subscriber."""
        return bool(self._subscribers)

    def publish(self, kind: str, body: object, at: float) -> None:
        """Number an event and offer it to everyone.

        Args:
            kind: `noun.past_verb`, one of the kinds of the live feed.
            body: anything msgspec can encode; encoded once for all clients.
            at: Unix seconds.
        """
        self._seq += 1
        event = Event(self._seq, encode_message(kind, self._seq, at, body))
        for subscriber in self._subscribers:
            subscriber.offer(event)

    def subscribe(self) -> Subscriber:
        """Return a new backlog; its first item asks for a snapshot.

        Events published while that snapshot is taken are already kept.
        """
        subscriber = Subscriber()
        self._subscribers.add(subscriber)
        return subscriber

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """Forget a backlog; forgetting it twice is no error."""
        self._subscribers.discard(subscriber)


def encode_message(kind: str, seq: int, at: float, body: object) -> bytes:
    """Return one message of the live feed as JSON text."""
    return msgspec.json.encode({"kind": kind, "seq": seq, "at": at, "body": body})
