"""A run gets another plan: asked for at any time, in force from a version on.

Journey: what is asked for waits in the row of the run. The transaction that makes the
next version adopts it, after it has recorded the plan that made the version. So all
tasks of a round, its merge and its step have one plan, and a round that is closed again
after a crash gives the same bytes. Where nobody has begun the open round, or it has
started over, no version needs to come first: there it is adopted at once. So a run that
diverges, and makes no version any more, can be helped.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec
from msgspec import Struct
from msgspec.structs import replace
from sqlalchemy import Connection

from bitnet_ext.wire.verdicts import ErrorCode
from coordinator.domain.errors import RefusedError
from coordinator.domain.plan import TrainingPlan, learning_rate_at
from coordinator.domain.plan_change import Change, Planned, differences, planned, told
from coordinator.domain.plan_words import BUDGET, WordError
from coordinator.service.fleet import FINISHED, RUNNING, Fleet
from coordinator.service.judging import leave_all_out
from coordinator.service.pacing import next_round_s
from coordinator.service.roster import plan_of
from coordinator.service.seeding import add_epoch_if_done, budget_left, is_over
from coordinator.service.steering import the_run
from coordinator.store import rounds, runs, versions, workers
from coordinator.store.rows import RoundRow, RunRow

log = logging.getLogger(__name__)

#: What the round time is chosen by.
_ROUND_TIME: Final = frozenset({"round_s", "round_min_s", "round_max_s"})


class Replanned(Struct, frozen=True, kw_only=True):
    """What comes of a wish."""

    #: All that changes, by earlier wishes too. Empty: the plan stays as it is.
    changes: Sequence[Change]
    #: The first version that is trained from by the new plan.
    version: int
    #: Whether that is the newest there is: nobody has begun its round.
    at_once: bool
    #: Learning rates after the tokens accepted so far, before and with the change.
    rates: tuple[float, float]
    #: What becomes of a run that was finished; None where it wasn't.
    outlook: str | None = None


async def set_plan(fleet: Fleet, words: Mapping[str, str]) -> Replanned:
    """Let a run train by other values from its next version on, or at once.

    Wishes add up until then; a field that is set back is taken out. Raises
    RefusedError: no_run, bad_request for a word that does not fit.
    """
    now = fleet.clock.now()
    found = await fleet.store.write(
        lambda connection: _grant(connection, fleet, words, now)
    )
    fleet.work.ring()
    fleet.changed.ring()
    return found


def in_force(run: RunRow) -> Planned:
    """Return what a run trains by."""
    plan = plan_of(run)
    # A plan from before there were schedules that follow the budget is constant.
    constant = replace(plan, schedule_tokens=plan.schedule_tokens or 0)
    return Planned(plan=constant, token_budget=run.token_budget or 0)


def asked_for(run: RunRow) -> Planned:
    """Return what a run is to train by from its next version on."""
    if run.next_plan_json is None:
        return in_force(run)
    plan = msgspec.json.decode(run.next_plan_json, type=TrainingPlan)
    return Planned(plan=plan, token_budget=run.next_token_budget or 0)


def changes_ahead(run: RunRow) -> list[Change]:
    """Return what changes with the next version of a run."""
    return differences(in_force(run), asked_for(run))


def adopt_plan(
    connection: Connection, run: RunRow, *, version: int, now: float
) -> RunRow:
    """Let the plan that is asked for come into force; return the run as it is then.

    To be called where `version` is made, once its row has the plan that made it; or
    in its round, as long as nobody works in that.
    """
    if run.next_plan_json is None:
        return run
    changes = changes_ahead(run)
    columns = {
        "plan_json": run.next_plan_json,
        "token_budget": run.next_token_budget or None,
        "next_plan_json": None,
        "next_token_budget": None,
    }
    runs.change_run(connection, run.run_id, **columns)
    body = _body(run, changes, version)
    workers.add_event(connection, at=now, kind="plan.adopted", body=body)
    log.info(
        "the plan changes with version %d: %s",
        version,
        told(changes),
        extra={"event": "plan.adopted", "run_id": run.run_id, "version": version},
    )
    return replace(run, **columns)


def adopt_where_idle(connection: Connection, fleet: Fleet, now: float) -> None:
    """Let what waits come into force where the open round has started over."""
    run = the_run(connection)
    live = _live(connection, run)
    if run.next_plan_json is not None and _is_idle(connection, live):
        _adopt_in_round(connection, fleet, run, live, now)


def _live(connection: Connection, run: RunRow) -> RoundRow:
    live = rounds.live_round(connection, run.run_id)
    if live is None:
        raise LookupError(f"run {run.run_id} has no live round")
    return live


def _is_idle(connection: Connection, live: RoundRow) -> bool:
    """Return whether nobody has begun a round, or it has started over."""
    return live.state == "open" and not rounds.claims_of(connection, live.round_id)


def _grant(
    connection: Connection, fleet: Fleet, words: Mapping[str, str], now: float
) -> Replanned:
    """Keep what is asked for, or adopt it."""
    run = found = the_run(connection)
    live = _live(connection, run)
    before, after = in_force(run), _after(run, words)
    at_once = _is_idle(connection, live)
    outcome = Replanned(
        changes=differences(before, after),
        version=live.base_version
        if at_once
        else versions.highest_number(connection) + 1,
        at_once=at_once,
        rates=(
            learning_rate_at(before.plan, run.tokens_accepted),
            learning_rate_at(after.plan, run.tokens_accepted),
        ),
    )
    if after != asked_for(run):
        run = _keep(connection, run, after, outcome, now)
    if at_once:
        run = _adopt_in_round(connection, fleet, run, live, now)
    return replace(outcome, outlook=_outlook(found, run))


def _keep(
    connection: Connection,
    run: RunRow,
    after: Planned,
    outcome: Replanned,
    now: float,
) -> RunRow:
    columns: dict[str, str | int | None] = {
        "next_plan_json": None,
        "next_token_budget": None,
    }
    if outcome.changes:
        columns["next_plan_json"] = msgspec.json.encode(after.plan).decode()
        columns["next_token_budget"] = after.token_budget
    runs.change_run(connection, run.run_id, **columns)
    body = _body(run, outcome.changes, outcome.version)
    workers.add_event(connection, at=now, kind="plan.set", body=body)
    return replace(run, **columns)


def _adopt_in_round(
    connection: Connection, fleet: Fleet, run: RunRow, live: RoundRow, now: float
) -> RunRow:
    """Adopt what waits in a round that nobody works in, and do what follows from it.

    What was claimed there before comes too late: it is of another plan. What came late
    from earlier rounds is left out where it is of the other kind.
    """
    names = {change.name for change in changes_ahead(run)}
    run = adopt_plan(connection, run, version=live.base_version, now=now)
    if names:
        rounds.forget_leases(connection, live.round_id)
    if "round_kind" in names:
        leave_all_out(
            connection,
            rounds.accepted_in_round(connection, live.round_id),
            round_id=live.round_id,
            reason="its round has become one of the other kind",
            now=now,
            rng=fleet.rng,
        )
    if names & _ROUND_TIME:
        round_s = next_round_s(connection, run, live)
        rounds.change_round(connection, live.round_id, round_s=round_s)
    return _train_on(connection, fleet, run, now) if BUDGET in names else run


def _train_on(connection: Connection, fleet: Fleet, run: RunRow, now: float) -> RunRow:
    """Let a run that has got more tokens go on, where its epoch was over too."""
    if run.state == FINISHED and not is_over(run, now):
        runs.change_run(connection, run.run_id, state=RUNNING)
        run = replace(run, state=RUNNING)
    add_epoch_if_done(connection, run, fleet.the_manifest(), now)
    return run


def _outlook(before: RunRow, run: RunRow) -> str | None:
    if before.state != FINISHED:
        return None
    if run.state != FINISHED:
        return "the run goes on"
    if budget_left(run) == 0:
        return "the run is finished: a larger token_budget lets it go on"
    return "the run is finished: `bitnet-coordinator train-for` lets it go on"


def _after(run: RunRow, words: Mapping[str, str]) -> Planned:
    try:
        return planned(
            words,
            in_force=in_force(run),
            asked=asked_for(run),
            tokens_accepted=run.tokens_accepted,
        )
    except WordError as error:
        raise RefusedError(
            ErrorCode.BAD_REQUEST, str(error), field=error.name
        ) from error


def _body(run: RunRow, changes: Sequence[Change], version: int) -> dict[str, object]:
    return {
        "run_id": run.run_id,
        "version": version,
        "changes": msgspec.to_builtins(changes),
    }
