"""A run whose processes are killed ends as every run has to end.

A worker dies while it holds a task, then the coordinator while a round has something
that no version holds yet. In between another plan is asked for. First weights, tasks
and order of text follow from the seeds; who trains which task does not. So the end is
held against what is due of every run: each token of the epoch is in one version and in
no other, and all versions follow from the seed, the stored payloads and the plans, to
the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from sqlalchemy import Connection

from bitnet_ext.layout import shape_from_json
from bitnet_ext.wire.verdicts import RoundKind, SubmissionState
from coordinator.app import DATABASE_NAME
from coordinator.control import Seed, SetPlan
from coordinator.domain.initial import initial_weights
from coordinator.domain.manifest import Manifest
from coordinator.service.broadcast import publication
from coordinator.service.stepping import Closing, next_state
from coordinator.service.version_blobs import VersionBlobs, first_state, write_version
from coordinator.store import rounds, runs, versions
from coordinator.store.blobs import Blobs
from coordinator.store.engine import read_once
from coordinator.store.rows import RoundRow, RunRow, SubmissionRow, VersionRow
from coordinator.store.system import OsFs, SystemRng
from tests.faults.signals import Process, stopped
from tests.integration.fleet import (
    CoordinatorProcess,
    coordinator,
    make_corpus,
    wait_for,
    workers,
)

pytestmark = pytest.mark.slow

NUM_TASKS = 12
SEED = 7
SETTINGS = {
    "SEED": SEED,
    "EVALUATE_EVERY": 1000,
    "KEEP_VERSIONS": 1000,
    "HEARTBEAT_S": 1,
}
MAY_TRAIN_INVENTED_TEXT = {"BITNET_ALLOW_SYNTHETIC_SHARDS": "true"}
WAIT_S = 240.0
#: What the run trains by from the middle on.
CHANGE = {"learning_rate": "0.01", "outer_momentum": "0.5", "broadcast": "ternary"}


@dataclass(frozen=True, kw_only=True)
class Journal:
    """All of a run that is stored, in order of versions."""

    run: RunRow
    versions: list[VersionRow]
    rounds: list[RoundRow]
    submissions: list[SubmissionRow]


@dataclass(frozen=True, kw_only=True)
class Ended:
    """What is left when the epoch is over."""

    manifest: Manifest
    data: Path
    journal: Journal
    #: How the claims of the worker that was killed ended.
    outcomes: set[str]


# The kind whose coordinator keeps the more; `test_chain` kills in delta rounds.
@pytest.fixture(scope="module", params=[RoundKind.GRADIENT])
def ended(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Ended]:
    folder = tmp_path_factory.mktemp("killing")
    manifest = make_corpus(folder / "corpus", words=1200, synthetic=True)
    epoch = sum(shard.num_tokens for shard in manifest.train_shards())
    chosen = SETTINGS | {"ROUND_KIND": request.param, "TOKEN_BUDGET": epoch}
    with coordinator(folder, **chosen) as process:
        process.tell(Seed(tokens=-(-epoch // NUM_TASKS)))
        train_and_kill(folder, process)
        query = "SELECT outcome FROM claims WHERE worker_id = 'one'"
        yield Ended(
            manifest=manifest,
            data=process.data,
            journal=read_once(process.data / DATABASE_NAME, read_journal),
            outcomes={outcome for (outcome,) in process.rows(query)},
        )


def train_and_kill(folder: Path, process: CoordinatorProcess) -> None:
    """Train the epoch with two workers; return when it is over."""
    env = MAY_TRAIN_INVENTED_TEXT
    with (
        workers(folder, process.url, "two", **env),
        workers(folder, process.url, "one", **env) as (one,),
    ):
        # Both calibrate first, which takes a while on a busy machine.
        wait_for("a first round", lambda: newest(process) > 1, timeout_s=WAIT_S)
        kill_while(one, lambda: holds_a_task(process, "one"))
        process.tell(SetPlan(words=CHANGE))
        with workers(folder, process.url, "one", **env):
            kill_while(process.process, lambda: has_unmerged_work(process))
            process.start_again()
            wait_for(
                "the end of the run",
                lambda: process.status()["run"]["state"] == "finished",
                timeout_s=WAIT_S,
            )


def kill_while(victim: Process, look: Callable[[], bool]) -> None:
    """Kill a process with -9 while `look` is true: it is stopped before we look."""

    def strike() -> bool:
        with stopped(victim):
            is_due = look()
            if is_due:
                victim.kill()
        return is_due

    wait_for("a moment to kill", strike, timeout_s=WAIT_S)
    victim.wait(60.0)


def newest(process: CoordinatorProcess) -> int:
    ((version,),) = process.rows("SELECT MAX(version) FROM versions")
    return int(version)


def holds_a_task(process: CoordinatorProcess, name: str) -> bool:
    query = "SELECT 1 FROM tasks WHERE kind = 'train' AND lease_worker_id = ?"
    return bool(process.rows(query, name))


def has_unmerged_work(process: CoordinatorProcess) -> bool:
    return bool(process.rows("SELECT 1 FROM submissions WHERE state = 'accepted'"))


def read_journal(connection: Connection) -> Journal:
    run = runs.newest_run(connection)
    assert run is not None
    return Journal(
        run=run,
        versions=versions.versions_of(connection, run.run_id),
        rounds=rounds.newest_rounds(connection, run.run_id, 10**6),
        submissions=rounds.submissions_since(connection, run.run_id, 0),
    )


def test_each_token_of_the_epoch_is_in_one_version(ended: Ended) -> None:
    applied = [
        row for row in ended.journal.submissions if row.state == SubmissionState.APPLIED
    ]

    for shard in ended.manifest.train_shards():
        at = 0
        for row in sorted(applied, key=lambda row: row.start_token):
            if row.shard_id == shard.shard_id:
                assert row.start_token == at
                at += row.tokens
        assert at == shard.num_tokens
    assert {row.epoch for row in applied} == {1}


def test_the_task_of_the_killed_worker_was_taken_from_it(ended: Ended) -> None:
    assert ended.outcomes - {"back"}


def test_the_journal_leads_to_the_same_bytes(ended: Ended, tmp_path: Path) -> None:
    replayed = replay(ended.journal, ended.data, tmp_path)
    stored = [
        (row.state_sha256, row.published_sha256) for row in ended.journal.versions
    ]

    assert len(stored) > 3
    assert len({row.plan_json for row in ended.journal.versions}) == 2
    assert [
        (blobs.state.sha256, blobs.published.sha256) for blobs in replayed
    ] == stored


def replay(journal: Journal, data: Path, fresh: Path) -> Iterator[VersionBlobs]:
    """Make every version anew, from the seed, the rows and the payloads alone."""
    run = journal.run
    shape = shape_from_json(msgspec.json.decode(run.model_json))
    layout = bytes.fromhex(run.layout_hash)
    root = msgspec.json.decode(journal.versions[0].plan_json)
    kind = RoundKind(root["round_kind"])
    payloads, made = (Blobs(folder, OsFs(), SystemRng()) for folder in (data, fresh))
    state = first_state(run.root_version, initial_weights(shape, SEED), kind)
    yield write_version(made, state, layout)
    for before, row in zip(journal.versions, journal.versions[1:], strict=False):
        closing = closing_of(journal, row, before)
        after = next_state(payloads, closing, state, None)
        assert after is not None
        sent = publication(
            made,
            after,
            base_version=before.version,
            known=None,
            broadcast=closing.plan.broadcast,
        )
        yield write_version(made, after, layout, sent)
        state = after


def closing_of(journal: Journal, row: VersionRow, before: VersionRow) -> Closing:
    merged = sorted(
        (found for found in journal.submissions if found.version == row.version),
        key=lambda found: (found.epoch, found.shard_id, found.start_token),
    )
    (live,) = (found for found in journal.rounds if found.round_id == row.round_id)
    return Closing(
        run=msgspec.structs.replace(journal.run, plan_json=row.plan_json),
        live=live,
        submissions=merged,
        version=row.version,
        tokens_before=before.tokens_total,
        factors=[found.factor or 0.0 for found in merged],
    )
