"""Commands to a running coordinator, over a socket that only its user can open.

One JSON object on a line in, one out. Without a running coordinator the same
commands run under the lock of the data folder (`coordinator.verbs`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from coordinator.domain.errors import FleetError, StartError
from coordinator.domain.plan_change import told
from coordinator.login.passwords import new_password, reset_admin_password
from coordinator.service.exporting import parse_version
from coordinator.service.feed import Feed
from coordinator.service.fleet import Fleet
from coordinator.service.replanning import Replanned, set_plan
from coordinator.service.rolling_back import ask_for_rollback
from coordinator.service.steering import (
    acknowledge_reset,
    seed_epoch,
    train_until,
)
from coordinator.service.tending import (
    Kicked,
    drain_worker,
    kick_stuck,
    kick_worker,
    put_away,
    readmit_worker,
    requeue_failed,
    resume_worker,
)

log = logging.getLogger(__name__)

SOCKET_NAME: Final = "control.sock"
TIMEOUT_S: Final = 60.0
MAX_TOKENS: Final = 2**62
MAX_SECONDS: Final = 1e9
_MAX_LINE_BYTES: Final = 4096
_OWN_FILES: Final = Path("/proc/self/fd")


@contextlib.contextmanager
def _address(folder: Path) -> Iterator[str]:
    """Yield a path to the socket that is short enough for one (107 bytes)."""
    if not _OWN_FILES.exists():  # not Linux
        yield str(folder / SOCKET_NAME)
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield str(_OWN_FILES / str(descriptor) / SOCKET_NAME)
    finally:
        os.close(descriptor)


class Seed(Struct, frozen=True, kw_only=True, tag="seed-real-tasks"):
    """Add one epoch; `tokens` None: tasks are cut when they are claimed."""

    tokens: int | None = None

    def __post_init__(self) -> None:
        if self.tokens is not None and not 1 <= self.tokens <= MAX_TOKENS:
            raise ValueError(
                f"tokens must be a whole number from 1 to {MAX_TOKENS}, or auto, "
                f"got {self.tokens}"
            )


class TrainFor(Struct, frozen=True, kw_only=True, tag="train-for"):
    """Stop giving out training after so many seconds; None: never by time."""

    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.seconds is not None and not 0.0 < self.seconds < MAX_SECONDS:
            raise ValueError(
                f"seconds must be a number above 0 and below {MAX_SECONDS:.0f}, or "
                f"`ever`, got {self.seconds}"
            )


class GoBack(Struct, frozen=True, kw_only=True, tag="roll-back"):
    """Go back to an earlier version once the round is closed: a number, or `best`."""

    version: str


class SetPlan(Struct, frozen=True, kw_only=True, tag="set-plan"):
    """Let the run train by other values from its next version on."""

    #: By name, as an operator writes them.
    words: dict[str, str]


class AcknowledgeReset(Struct, frozen=True, tag="acknowledge-reset"):
    """Take the banner of a hard reset down."""


class ReadmitWorker(Struct, frozen=True, kw_only=True, tag="readmit-worker"):
    """Give a quarantined worker work again."""

    worker_id: str


class DrainWorker(Struct, frozen=True, kw_only=True, tag="drain-worker"):
    """Give a worker no more tasks."""

    worker_id: str


class ResumeWorker(Struct, frozen=True, kw_only=True, tag="resume-worker"):
    """Give a worker that drains tasks again."""

    worker_id: str


class MarkGone(Struct, frozen=True, kw_only=True, tag="mark-gone"):
    """Put a worker away that drains or is lost."""

    worker_id: str


class KickStuck(Struct, frozen=True, kw_only=True, tag="kick-stuck"):
    """End the lease of a worker that is stuck or lost, or has no token yet."""

    #: None: of every one that is stuck or lost.
    worker_id: str | None = None


class RequeueFailed(Struct, frozen=True, kw_only=True, tag="requeue-failed"):
    """Make a failed task pending again, its attempts anew."""

    #: None: every one of the run.
    task_id: str | None = None


class ResetPassword(Struct, frozen=True, tag="reset-admin-password"):
    """Make a new admin password and end every session."""


#: What is done to one worker, or to tasks.
Tending = (
    ReadmitWorker | DrainWorker | ResumeWorker | MarkGone | KickStuck | RequeueFailed
)
Command = (
    Seed | TrainFor | SetPlan | GoBack | AcknowledgeReset | ResetPassword | Tending
)


class KeyOrigin(Struct, frozen=True, tag="key-origin"):
    """Say whether the key of workers is the one in the data folder, or was set."""


#: What `KeyOrigin` is answered for a key from the environment.
KEY_IS_SET: Final = "set"
#: Why a line between command line and coordinator makes no sense.
OTHER_VERSION: Final = (
    "the coordinator that runs is of another version of this program: restart it with "
    "this one"
)
_KEY_IN_FOLDER: Final = "in the folder"


class Status(Struct, frozen=True, tag="status"):
    """Say how the fleet is doing: a `FleetView` without history, as JSON."""


class DumpTelemetry(Struct, frozen=True, tag="dump-telemetry"):
    """Say all that an expert may need: a `Telemetry`, as JSON."""


Question = KeyOrigin | Status | DumpTelemetry


class Outcome(Struct, frozen=True, kw_only=True):
    """What became of a command: a sentence, or an error. Of a question: its answer."""

    said: str = ""
    error: str | None = None


async def obey(fleet: Fleet, command: Command) -> str:
    """Do what was asked and return one sentence. Raises FleetError."""
    match command:
        case Seed(tokens=tokens):
            seeded = await seed_epoch(fleet, tokens)
            how = f"{seeded.num_tasks} tasks" if tokens else "tasks cut at claim"
            return f"epoch {seeded.epoch}: {seeded.num_tokens} tokens, {how}"
        case TrainFor(seconds=float(seconds)):
            await train_until(fleet, fleet.clock.now() + seconds)
            return f"training for {seconds:g} s more"
        case TrainFor():
            await train_until(fleet, None)
            return "training until the token budget is used up"
        case GoBack(version=version):
            to = await ask_for_rollback(fleet, parse_version(version))
            return (
                f"the run goes back to version {to} once its round is closed; no "
                "training is given out until then"
            )
        case SetPlan(words=words):
            return _replanned(await set_plan(fleet, words))
        case AcknowledgeReset():
            await acknowledge_reset(fleet)
            return "reset acknowledged"
        case ResetPassword():
            password = new_password(fleet.rng)
            await fleet.store.write(
                lambda connection: reset_admin_password(connection, password)
            )
            return f"new admin password: {password}"
        case _:
            return await _tend(fleet, command)


def _replanned(outcome: Replanned) -> str:
    if not outcome.changes:
        said = "the plan stays as it is"
    elif outcome.at_once:
        said = f"at once, as nobody has begun the open round: {told(outcome.changes)}"
    else:
        said = (
            f"from version {outcome.version} on, when the open round is closed: "
            f"{told(outcome.changes)}"
        )
    before, after = outcome.rates
    if before != after:
        said += (
            "; at the tokens accepted so far the learning rate goes from "
            f"{before:.3g} to {after:.3g}"
        )
    return said if outcome.outlook is None else f"{said}; {outcome.outlook}"


async def _tend(fleet: Fleet, command: Tending) -> str:
    match command:
        case ReadmitWorker(worker_id=worker_id):
            await readmit_worker(fleet, worker_id)
            return f"worker {worker_id} gets work again"
        case DrainWorker(worker_id=worker_id):
            held = await drain_worker(fleet, worker_id)
            rest = f"; {', '.join(held)} comes back after this step" if held else ""
            return f"worker {worker_id} gets no more tasks{rest}"
        case ResumeWorker(worker_id=worker_id):
            await resume_worker(fleet, worker_id)
            return f"worker {worker_id} gets tasks again"
        case MarkGone(worker_id=worker_id):
            taken = await put_away(fleet, worker_id)
            rest = f"; {', '.join(taken)} is taken from it" if taken else ""
            return f"worker {worker_id} is gone, until it comes back{rest}"
        case KickStuck(worker_id=str(worker_id)):
            return _kicked(worker_id, await kick_worker(fleet, worker_id))
        case KickStuck():
            taken = (await kick_stuck(fleet)).tasks
            if not taken:
                return "nothing to take: no worker that is stuck or lost holds a task"
            return f"taken from workers that stand still: {', '.join(taken)}"
        case RequeueFailed():
            count = await requeue_failed(fleet, command.task_id)
            return f"{count} failed tasks are pending again"


def _kicked(worker_id: str, kicked: Kicked) -> str:
    if kicked.ended_s is None:
        return f"taken from worker {worker_id}: {', '.join(kicked.tasks)}"
    return (
        f"nothing to take: the lease of worker {worker_id} ended "
        f"{kicked.ended_s:.0f} s ago, and its task has been free for others since (or "
        "was given up, after its last attempt); the worker lets go of it when it is "
        "heard and its step is over"
    )


class ControlServer:
    """Listens on `data/control.sock`; `key_is_set`: workers' key is of no file."""

    def __init__(
        self, fleet: Fleet, feed: Feed, folder: Path, *, key_is_set: bool
    ) -> None:
        self._fleet = fleet
        self._feed = feed
        self._key_is_set = key_is_set
        self._path = folder / SOCKET_NAME
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen. The lock of the folder is ours, so an old socket is a leftover."""
        self._path.unlink(missing_ok=True)
        with _address(self._path.parent) as address:
            self._server = await asyncio.start_unix_server(
                self._serve, path=address, limit=_MAX_LINE_BYTES
            )
        self._path.chmod(0o600)

    async def stop(self) -> None:
        """Listen no more."""
        if self._server is not None:
            self._server.close()
            self._path.unlink(missing_ok=True)

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with contextlib.suppress(ConnectionError):  # who asked is gone
            outcome = await self._answer(reader)
            writer.write(msgspec.json.encode(outcome) + b"\n")
            await writer.drain()
        writer.close()

    async def _answer(self, reader: asyncio.StreamReader) -> Outcome:
        try:
            line = await reader.readline()
        except ValueError:  # how asyncio tells of a line over its limit
            return Outcome(
                error=f"a command must be a line of at most {_MAX_LINE_BYTES} bytes"
            )
        try:
            command: Command | Question = msgspec.json.decode(
                line, type=Command | Question
            )
            if isinstance(command, Question):
                return Outcome(said=await self._tell(command))
            return Outcome(said=await obey(self._fleet, command))
        except FleetError as error:
            return Outcome(error=str(error))
        except msgspec.DecodeError as error:
            # A command by a name that this program does not have.
            is_new = str(error).endswith("`$.type`")
            return Outcome(error=f"{OTHER_VERSION} ({error})" if is_new else str(error))
        except Exception:
            log.exception("a command failed", extra={"event": "command.failed"})
            return Outcome(error="internal error; the log has the story")

    async def _tell(self, question: Question) -> str:
        match question:
            case KeyOrigin():
                return KEY_IS_SET if self._key_is_set else _KEY_IN_FOLDER
            case Status():
                return msgspec.json.encode(await self._feed.glance()).decode()
            case DumpTelemetry():
                return msgspec.json.encode(await self._feed.telemetry()).decode()


def ask(folder: Path, command: Command | Question) -> str | None:
    """Send a command to the coordinator of a data folder; None when none runs.

    Raises StartError with the reason when it is refused, or when no answer comes.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(TIMEOUT_S)
        try:
            with _address(folder) as address:
                connection.connect(address)
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        try:
            connection.sendall(msgspec.json.encode(command) + b"\n")
            with connection.makefile("rb") as answer:
                outcome = msgspec.json.decode(answer.readline(), type=Outcome)
        except (OSError, msgspec.DecodeError) as error:
            raise StartError(
                f"the coordinator of {folder} gave no answer ({error}); whether it did "
                "what was asked is not known"
            ) from error
    if outcome.error is not None:
        raise StartError(outcome.error)
    return outcome.said
