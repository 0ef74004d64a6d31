"""The figures of `GET /metrics`, in the Prometheus text format. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from bitnet_ext.wire.verdicts import Verdict
from coordinator.domain.accounting import WASTED, Fate
from coordinator.service.view import (
    FleetView,
    TallyView,
    TasksView,
    TrainingView,
    WorkerView,
)

#: Name, kind, and the samples: labels as they are written, and the value.
Figure = tuple[str, str, Sequence[tuple[str, float]]]


def metrics_text(view: FleetView, *, worst_lag_s: float) -> str:
    """Return one sample a line, after a line that says what kind they are of."""
    return "".join(
        f"# TYPE {name} {kind}\n"
        + "".join(f"{name}{labels} {value}\n" for labels, value in samples)
        for name, kind, samples in _figures(view, worst_lag_s)
        if samples
    )


def _figures(view: FleetView, worst_lag_s: float) -> Iterator[Figure]:
    yield _gauge("fleet_loop_lag_seconds", view.server.loop_lag_ms / 1000.0)
    yield _gauge("fleet_loop_lag_worst_seconds", worst_lag_s)
    yield from _workers(view.workers)
    if view.run is not None:
        yield _gauge("fleet_tokens_accepted", view.run.tokens_accepted)
        yield _by_fate(view.run.tally)
        yield _gauge("fleet_version_newest", view.run.newest_version)
        yield _gauge("fleet_tokens_per_second", view.run.tokens_per_s or 0.0)
    if view.training is not None:
        yield from _training(view.training)
    if view.round is not None:
        yield _gauge("fleet_round_seconds", view.round.round_s)
        if view.round.overhead_s is not None:
            yield _gauge("fleet_round_overhead_seconds", view.round.overhead_s)
    if view.tasks is not None:
        yield from _tasks(view.tasks)
    if view.evaluations:
        newest = view.evaluations[-1]
        yield _gauge("fleet_heldout_loss_nats", newest.loss)
        yield _gauge("fleet_heldout_bits_per_byte", newest.bits_per_byte)


def _by_fate(tally: TallyView) -> Figure:
    """Return a gauge, not a counter: tokens change their fate, so each can fall."""
    waste = {fate: tally.wasted.get(fate, 0) for fate in WASTED}
    found = {Fate.ACCEPTED: tally.accepted, Fate.APPLIED: tally.applied} | waste
    samples = [(f'{{fate="{fate}"}}', float(found[fate])) for fate in Fate]
    return "fleet_tokens_by_fate", "gauge", samples


def _training(training: TrainingView) -> Iterator[Figure]:
    yield _gauge("fleet_learning_rate", training.learning_rate)
    yield _gauge("fleet_weight_decay", training.weight_decay)
    if training.last_round is not None:
        sent = training.last_round.payload_bytes
        yield _gauge("fleet_last_round_payload_bytes", sent)


def _tasks(tasks: TasksView) -> Iterator[Figure]:
    yield _gauge("fleet_tasks_pending", tasks.pending)
    yield _gauge("fleet_tasks_leased", tasks.leased)
    yield _gauge("fleet_tasks_done", tasks.done)
    yield _gauge("fleet_tasks_failed", tasks.failed)
    yield _gauge("fleet_tasks_soft_expired", tasks.soft_expired)
    yield _gauge("fleet_tasks_stuck", tasks.stuck)


def _workers(rows: Sequence[WorkerView]) -> Iterator[Figure]:
    words = Counter(row.verdict for row in rows)
    fleet = [row for row in rows if row.verdict != Verdict.GONE]
    yield _gauge("fleet_workers_registered", len(fleet))
    by_word = [(f'{{verdict="{word}"}}', float(words[word])) for word in Verdict]
    yield "fleet_workers", "gauge", by_word
    ages = {row.worker_id: row.facts.heartbeat_age_s for row in fleet}
    yield _of_workers("fleet_worker_heartbeat_age_seconds", ages)
    speeds = {row.worker_id: row.tokens_per_s for row in fleet}
    yield _of_workers("fleet_worker_tokens_per_second", speeds)
    held = [row for row in fleet if row.task_id is not None]
    elapsed = {row.worker_id: row.facts.elapsed_s for row in held}
    yield _of_workers("fleet_worker_task_elapsed_seconds", elapsed)
    ratios = {row.worker_id: row.books.duration_ratio for row in fleet}
    yield _of_workers("fleet_worker_duration_ratio", ratios)
    predicted = {row.worker_id: row.facts.predicted_s for row in held}
    yield _of_workers("fleet_worker_task_predicted_seconds", predicted)


def _gauge(name: str, value: float) -> Figure:
    return name, "gauge", [("", value)]


def _of_workers(
    name: str, values: dict[str, float | None] | dict[str, float]
) -> Figure:
    """Return a gauge for each worker that has a value. Ids need no escaping."""
    known = [
        (f'{{worker="{worker_id}"}}', value)
        for worker_id, value in values.items()
        if value is not None
    ]
    return name, "gauge", known
