"""What an operator asks of a coordinator: more work, or a time to stop."""

from __future__ import annotations

from typing import Final

import msgspec
from sqlalchemy import Connection

from bitnet_ext.wire.verdicts import ErrorCode
from coordinator.domain.errors import RefusedError
from coordinator.domain.manifest import Manifest
from coordinator.service.fleet import RUNNING, Fleet, no_run
from coordinator.service.seeding import add_epoch, add_fixed_tasks, budget_left
from coordinator.store import runs, workers
from coordinator.store.rows import RunRow

MAX_TASKS: Final = 100_000


class Seeded(msgspec.Struct, frozen=True, kw_only=True):
    """What was added."""

    epoch: int
    #: Tasks made ahead; 0 where they are cut when they are claimed.
    num_tasks: int
    num_tokens: int


async def seed_epoch(fleet: Fleet, tokens: int | None) -> Seeded:
    """Add one epoch: of ranges, or of tasks of `tokens` tokens each.

    Raises RefusedError: no_run, bad_request for a size out of range.
    """
    now = fleet.clock.now()
    manifest = fleet.the_manifest()
    total = sum(shard.num_tokens for shard in manifest.train_shards())
    check_task_size(manifest, tokens)

    def add(connection: Connection) -> Seeded:
        run = the_run(connection)
        check_running(run)
        num_tasks = 0
        if tokens is None:
            add_epoch(connection, run, manifest)
        else:
            num_tasks = add_fixed_tasks(
                connection, run, manifest, tokens=tokens, now=now, rng=fleet.rng
            )
        body = {"run_id": run.run_id, "epoch": run.epoch + 1}
        workers.add_event(connection, at=now, kind="epoch.seeded", body=body)
        return Seeded(epoch=run.epoch + 1, num_tasks=num_tasks, num_tokens=total)

    seeded = await fleet.store.write(add)
    fleet.work.ring()
    fleet.changed.ring()
    return seeded


async def train_until(fleet: Fleet, stop_at: float | None) -> None:
    """Give out training until then (Unix seconds), or to the end of the budget.

    A run that had finished for want of time goes on. Raises RefusedError: no_run,
    bad_request when the token budget is used up.
    """

    def change(connection: Connection) -> None:
        run = the_run(connection)
        if budget_left(run) == 0:
            raise _used_up(run)
        runs.change_run(connection, run.run_id, stop_at=stop_at, state=RUNNING)

    await fleet.store.write(change)
    fleet.work.ring()
    fleet.changed.ring()


async def acknowledge_reset(fleet: Fleet) -> None:
    """Take the banner of a hard reset down. Raises RefusedError no_run."""

    def change(connection: Connection) -> None:
        run = the_run(connection)
        runs.change_run(connection, run.run_id, reset_acknowledged=True)

    await fleet.store.write(change)
    fleet.changed.ring()


def check_task_size(manifest: Manifest, tokens: int | None) -> None:
    """Raise RefusedError `bad_request` for a size that makes too many tasks."""
    if tokens is None:
        return
    total = sum(shard.num_tokens for shard in manifest.train_shards())
    least = -(-total // MAX_TASKS)
    if tokens < max(1, least):
        raise RefusedError(
            ErrorCode.BAD_REQUEST,
            f"tokens must be at least {max(1, least)} ({MAX_TASKS} tasks at most), "
            f"got {tokens}",
            field="tokens",
        )


def check_running(run: RunRow) -> None:
    """Raise RefusedError `bad_request` for a run that is finished, and say why."""
    if run.state != RUNNING:
        if budget_left(run) == 0:
            raise _used_up(run)
        raise RefusedError(
            ErrorCode.BAD_REQUEST,
            f"run {run.run_id} is {run.state}: give it time first, with "
            f"`bitnet-coordinator train-for`",
            field="run_id",
        )


def _used_up(run: RunRow) -> RefusedError:
    """Return the refusal of more training beyond the budget."""
    return RefusedError(
        ErrorCode.BAD_REQUEST,
        f"token_budget of run {run.run_id} ({run.token_budget} tokens) is used up: to "
        "train on, give it more with `bitnet-coordinator set-plan token_budget=TOKENS`",
        field="token_budget",
    )


def the_run(connection: Connection) -> RunRow:
    """Return the newest run. Raises RefusedError `no_run`."""
    run = runs.newest_run(connection)
    if run is None:
        raise no_run()
    return run
