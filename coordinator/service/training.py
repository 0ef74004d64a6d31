"""How a run trains, as the page and `status` show it: what is in force of its plan."""

from __future__ import annotations

from statistics import median_low

from sqlalchemy import Connection

from bitnet_ext.wire.verdicts import RoundKind
from coordinator.domain.plan import learning_rate_at, weight_decay_at
from coordinator.domain.stages import constant_reason, second_stage_begins, stage_at
from coordinator.service.roster import plan_from, plan_of
from coordinator.service.view import LastRoundView, TrainingView
from coordinator.store import rounds
from coordinator.store.rows import RunRow


def training_view(connection: Connection, run: RunRow) -> TrainingView:
    """Return what is in force at the tokens that are accepted."""
    plan, tokens = plan_of(run), run.tokens_accepted
    has_steps = plan.round_kind is RoundKind.DELTA
    stage, stage_end_tokens = stage_at(plan, tokens)
    return TrainingView(
        round_kind=plan.round_kind,
        aggregation=plan.aggregation,
        local_optimiser=plan.local_optimiser if has_steps else None,
        learning_rate=learning_rate_at(plan, tokens),
        peak_rate=plan.learning_rate,
        stage=stage,
        stage_end_tokens=stage_end_tokens,
        second_stage_tokens=second_stage_begins(plan),
        constant_reason=constant_reason(plan, run.token_budget),
        weight_decay=weight_decay_at(plan, tokens),
        codec=plan.codec,
        broadcast=plan.broadcast,
        last_round=_last_round(connection, run),
    )


def _last_round(connection: Connection, run: RunRow) -> LastRoundView | None:
    applied = rounds.applied_last(connection, run.run_id)
    if not applied:
        return None
    made_by = plan_from(connection, run, max(row.base_version for row in applied))
    has_steps = made_by.round_kind is RoundKind.DELTA
    return LastRoundView(
        tokens=sum(row.tokens for row in applied),
        payload_bytes=sum(row.payload_bytes for row in applied),
        num_steps=median_low(row.num_steps for row in applied) if has_steps else None,
    )
