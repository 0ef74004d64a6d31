"""What `bitnet-coordinator status` prints: a fleet in lines of plain text. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Final

from bitnet_ext.wire.messages import EXACT
from bitnet_ext.wire.verdicts import Verdict
from coordinator.domain.plan import Aggregation
from coordinator.domain.plan_change import told
from coordinator.domain.stages import Stage
from coordinator.service.view import (
    FleetView,
    LastRoundView,
    RollbackView,
    RoundView,
    RunView,
    TasksView,
    TrainingView,
    WorkerView,
)

#: Rows stand in this order: worst first.
_WORST_FIRST: Final = (
    Verdict.QUARANTINED,
    Verdict.LOST,
    Verdict.STUCK,
    Verdict.SLOW,
    Verdict.DRAINING,
    Verdict.IDLE,
    Verdict.WAITING,
    Verdict.COMPUTING,
)
_HEAD: Final = (
    "VERDICT",
    "WORKER",
    "TASK",
    "TOKENS/S",
    "HEARTBEAT",
    "ELAPSED",
    "PREDICTED",
    "EVIDENCE",
)
_NONE: Final = "-"


def status_text(view: FleetView) -> str:
    """Return how the run does and trains, then a line for each worker not gone."""
    return "\n".join(_lines(view))


def moment(at: float) -> str:
    """Return Unix seconds as a date and a time."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _lines(view: FleetView) -> Iterator[str]:
    if view.missing is not None:
        yield f"MISSING  {' '.join(view.missing.split())}"
    if view.run is not None:
        yield from _run(view.run)
    if view.training is not None:
        yield f"rate     {_rate(view.training)}"
        yield f"training {_training(view.training)}"
    if view.round is not None:
        yield f"round    {_round(view.round)}"
        yield f"time     {view.round.round_s:g} s a round. {view.round.round_reason}"
    if view.tasks is not None:
        yield f"tasks    {_tasks(view.tasks)}"
    yield f"workers  {_amounts(view.workers)}"
    rows = [row for row in view.workers if row.verdict != Verdict.GONE]
    if rows:
        yield ""
        yield from _table(rows)


def _run(run: RunView) -> Iterator[str]:
    budget = "" if run.token_budget is None else f" of {run.token_budget}"
    speed = "" if run.tokens_per_s is None else f", {run.tokens_per_s:.0f} tokens/s"
    yield (
        f"run      {run.run_id} ({run.preset}), {run.state}, epoch {run.epoch}, "
        f"version {run.newest_version}, {run.tokens_accepted}{budget} tokens{speed}"
    )
    yield f"ETA      {_eta(run)}"
    if run.loss_alarm is not None:
        yield f"ALARM    Held-out loss has risen. {run.loss_alarm}"
    if run.rollback is not None:
        yield f"rollback {_rollback(run.rollback)}"
    if run.plan_changes:
        yield f"plan     from the next version on: {told(run.plan_changes)}"


def _eta(run: RunView) -> str:
    eta = run.eta
    if eta.at is None or eta.earliest_at is None or eta.latest_at is None:
        return f"unknown. {eta.reason}"
    return (
        f"{moment(eta.at)}, between {moment(eta.earliest_at)} and "
        f"{moment(eta.latest_at)}. {eta.reason}"
    )


def _rollback(rollback: RollbackView) -> str:
    left, to = rollback.from_version, rollback.to_version
    ways = (
        f"from version {left} ({_loss(rollback.from_loss)}) to version {to} "
        f"({_loss(rollback.to_loss)})"
    )
    if rollback.version is None:
        return f"about to go back {ways}, once the round is closed"
    return f"went back {ways}, which is version {rollback.version} now"


def _loss(loss: float | None) -> str:
    return "not scored" if loss is None else f"held-out loss {loss:.4f}"


def _rate(training: TrainingView) -> str:
    return (
        f"{training.learning_rate:.3g} (peak {training.peak_rate:.3g}), "
        f"{_stage(training)} Weight decay {training.weight_decay:g}."
    )


def _stage(training: TrainingView) -> str:
    if training.stage == Stage.OVER:
        return "its schedule is over."
    end = training.stage_end_tokens
    until = "" if end is None else f" until {end} accepted tokens"
    if training.constant_reason is None:
        return f"{training.stage}{until}."
    then = "" if end is None else ", then constant"
    return f"{training.stage}{until}{then}. {training.constant_reason}"


def _training(training: TrainingView) -> str:
    kind = f"{training.round_kind} rounds"
    if training.aggregation == Aggregation.PER_ARRIVAL:
        kind = f"a version for each {training.round_kind}"
    steps = ""
    if training.local_optimiser is not None:
        steps = f", local steps by {training.local_optimiser}"
    is_whole = training.broadcast == EXACT
    down = "whole versions" if is_whole else f"{training.broadcast} links"
    return (
        f"{kind}{steps}; {training.codec} up, {down} down."
        f"{_last_round(training.last_round)}"
    )


def _last_round(last: LastRoundView | None) -> str:
    if last is None:
        return ""
    steps = ""
    if last.num_steps is not None:
        of_steps = "local step" if last.num_steps == 1 else "local steps"
        steps = f", {last.num_steps} {of_steps} of its middle worker"
    return f" Last round: {last.tokens} tokens{steps}, {last.payload_bytes} bytes up."


def _round(live: RoundView) -> str:
    back = sum(lane.outcome == "back" for lane in live.lanes)
    return (
        f"{live.round_id} on version {live.base_version}, {live.state}, "
        f"{back} of {len(live.lanes)} back"
    )


def _tasks(tasks: TasksView) -> str:
    return (
        f"{tasks.pending} pending, {tasks.leased} leased ({tasks.soft_expired} "
        f"soft-expired, {tasks.stuck} stuck), {tasks.done} done, "
        f"{tasks.failed} failed; {tasks.range_tokens} tokens not cut yet"
    )


def _amounts(rows: Sequence[WorkerView]) -> str:
    words = Counter(row.verdict for row in rows)
    amounts = [f"{words[word]} {word}" for word in Verdict if words[word]]
    return ", ".join(amounts) or "none has registered"


def _table(rows: Sequence[WorkerView]) -> Iterator[str]:
    ordered = sorted(rows, key=lambda row: (_rank(row), row.worker_id))
    cells = [_HEAD, *map(_cells, ordered)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        yield "  ".join(padded).rstrip()


def _rank(row: WorkerView) -> int:
    return _WORST_FIRST.index(Verdict(row.verdict))


def _cells(row: WorkerView) -> tuple[str, ...]:
    facts = row.facts
    holds = row.task_id is not None
    return (
        row.verdict,
        row.worker_id,
        row.task_id or _NONE,
        _NONE if row.tokens_per_s is None else f"{row.tokens_per_s:.1f}",
        f"{facts.heartbeat_age_s:.0f} s",
        f"{facts.elapsed_s:.0f} s" if holds else _NONE,
        _NONE if facts.predicted_s is None else f"{facts.predicted_s:.0f} s",
        row.evidence,
    )
