"""What every use case works with: the store, the blobs, the clock, and who to tell.

One object for one coordinator process; the composition root makes it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Final, Protocol, TypeVar

from bitnet_ext.wire.verdicts import ErrorCode
from coordinator.domain.errors import RefusedError
from coordinator.domain.manifest import Manifest
from coordinator.domain.rollback import RollBack
from coordinator.domain.seams import Clock, Fs, Rng
from coordinator.service.shard_check import Stamp
from coordinator.store.blobs import Blobs
from coordinator.store.engine import Store

T = TypeVar("T")

#: Hands an event (kind, body, Unix seconds) to the live feed, on the loop.
OnEvent = Callable[[str, object, float], None]

#: A file that workers are served: a version by its number, a shard by its id.
Served = int | str

RUNNING: Final = "running"
FINISHED: Final = "finished"


class Bell:
    """Wakes everyone who waits for a change."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def ring(self) -> None:
        """Wake everyone who waits now; later waiters wait for the next ring."""
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self, timeout_s: float | None = None) -> bool:
        """Return at the next ring, or after `timeout_s`: whether it has rung."""
        event = self._event
        try:
            async with asyncio.timeout(timeout_s):
                return await event.wait()
        except TimeoutError:
            return False


@dataclass(slots=True, kw_only=True)
class FileFault:
    """A file of ours that tasks need, and that can't be served."""

    #: What is wrong, and what an operator can do.
    reason: str
    #: When it is looked at again, by the lease clock; and how often it was.
    look_at: float
    num_looks: int = 1


class Known(Protocol):
    """What is known of a fleet beside its database, by whoever only looks."""

    @property
    def is_running(self) -> bool:
        """Whether a coordinator runs; else all is as it was when one last did."""

    @property
    def manifest(self) -> Manifest | None:
        """The prepared corpus; None until there is one."""

    @property
    def corpus_fault(self) -> str | None:
        """Why the corpus that is there cannot be used."""

    @property
    def disk_fault(self) -> str | None:
        """Why the last claim found no room for a result; None where it did."""

    @property
    def file_faults(self) -> Mapping[Served, FileFault]:
        """Files that tasks need and can't get."""

    @property
    def heartbeat_s(self) -> float:
        """Heartbeat interval of workers that set none, in seconds."""


@dataclass(slots=True, kw_only=True)
class Fleet:
    """The collaborators of the use cases."""

    is_running: ClassVar[bool] = True
    store: Store
    blobs: Blobs
    fs: Fs
    clock: Clock
    rng: Rng
    #: Folder of the corpus; `tokenized` lies inside.
    corpus: Path
    on_event: OnEvent
    #: Makes lease ids; never leaves this process.
    secret: bytes
    #: Runs what takes long (outer steps, decoding, hashing) off the loop.
    workbench: Executor
    #: Heartbeat interval of workers that set none, in seconds.
    heartbeat_s: float
    #: Newest versions that keep their blobs.
    keep_versions: int
    #: When a run goes back to its best version by itself.
    roll_back: RollBack = RollBack.NEVER
    #: The prepared corpus; None until there is one.
    manifest: Manifest | None = None
    #: When leases were last looked at, `Clock.monotonic`; None before that.
    swept_at: float | None = None
    #: When this coordinator last began to run, or went on after it stood still, by the
    #: lease clock.
    awake_since: float = 0.0
    #: Held while leases get the grace that a sleep of this process has cost them.
    waking: asyncio.Lock = field(default_factory=asyncio.Lock)
    #: Held while an export is written.
    exporting: asyncio.Lock = field(default_factory=asyncio.Lock)
    #: Set once the coordinator was told to stop: no more work is given out.
    is_stopping: bool = False
    #: Why the corpus that is there cannot be used; None where it can, or is none.
    corpus_fault: str | None = None
    #: Why the last claim found no room for a result: none is given out until one does.
    disk_fault: str | None = None
    #: Files that tasks need and can't get: no work is given out while there are any.
    file_faults: dict[Served, FileFault] = field(default_factory=dict)
    #: What the shards of the manifest were like when they were hashed, by id.
    shard_stamps: dict[str, Stamp] = field(default_factory=dict)
    #: Keeps the prepared corpus from being replaced, until it is closed.
    corpus_held: ExitStack = field(default_factory=ExitStack)
    #: Rings when there may be something to claim.
    work: Bell = field(default_factory=Bell)
    #: Rings when a round may be ready to close.
    round_ready: Bell = field(default_factory=Bell)
    #: Rings when the page should look again.
    changed: Bell = field(default_factory=Bell)

    def close(self) -> None:
        """Let go of the corpus."""
        self.corpus_held.close()

    def publish(self, kind: str, body: object) -> None:
        """Tell the live feed; to be called on the loop, after the commit."""
        self.on_event(kind, body, self.clock.now())

    async def off_loop(self, act: Callable[[], T]) -> T:
        """Run what takes long on the workbench, and wait for it."""
        return await asyncio.get_running_loop().run_in_executor(self.workbench, act)

    def stop_giving_out(self) -> None:
        """Give out no more work, and answer those who wait for some."""
        self.is_stopping = True
        self.work.ring()

    def the_manifest(self) -> Manifest:
        """Return the manifest. Raises RefusedError `no_run` before there is one."""
        if self.manifest is None:
            raise no_run()
        return self.manifest


def no_run() -> RefusedError:
    """Return the refusal of everything that needs a run."""
    return RefusedError(
        ErrorCode.NO_RUN,
        "there is no run yet: prepare a corpus with "
        "`bitnet-coordinator tokenize-corpus`",
        retry_after_s=5.0,
    )
