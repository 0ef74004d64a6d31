"""Weight versions and their scores."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, Final

from sqlalchemy import Connection, bindparam, func, insert, or_, select, update

from bitnet_ext.wire.verdicts import RoundKind
from coordinator.store.rows import (
    EvaluationRow,
    PointRow,
    ScoreRow,
    VersionRow,
    typed,
)
from coordinator.store.tables import evaluations, rounds, versions

_parents = versions.alias("parents")
#: Made once, as each claim and each submission asks for them.
_ONE: Final = select(versions).where(versions.c.version == bindparam("of_version"))
_AFTER: Final = select(versions).where(versions.c.parent == bindparam("of_version"))
#: What charts show of a version, with the start of its round and its parent's tokens;
_POINTS: Final = select(
    versions.c.version,
    versions.c.created_at,
    versions.c.tokens_total,
    versions.c.num_submissions,
    versions.c.train_loss,
    versions.c.rolled_back_to,
    rounds.c.first_claim_at,
    _parents.c.tokens_total.label("tokens_before"),
).select_from(
    versions.outerjoin(rounds, rounds.c.round_id == versions.c.round_id).outerjoin(
        _parents, _parents.c.version == versions.c.parent
    )
)
#: and of a score, with the tokens that its version was trained on.
_SCORES: Final = select(
    evaluations.c.version,
    evaluations.c.nats,
    evaluations.c.tokens,
    evaluations.c.bytes,
    versions.c.tokens_total,
).join(versions, versions.c.version == evaluations.c.version)


def add_version(connection: Connection, **columns: Any) -> None:
    """Insert a version whose two blobs are durable."""
    connection.execute(insert(versions).values(**columns))


def find_version(connection: Connection, version: int) -> VersionRow | None:
    """Return a version by its number."""
    row = connection.execute(_ONE, {"of_version": version}).first()
    return None if row is None else typed(VersionRow, row)


def version_after(connection: Connection, version: int) -> VersionRow | None:
    """Return the version that was made of this one; None where it is the newest."""
    row = connection.execute(_AFTER, {"of_version": version}).first()
    return None if row is None else typed(VersionRow, row)


def newest_version(connection: Connection, run_id: str) -> VersionRow:
    """Return the newest version of a run, which always has its root."""
    row = connection.execute(
        select(versions)
        .where(versions.c.run_id == run_id)
        .order_by(versions.c.version.desc())
        .limit(1)
    ).one()
    return typed(VersionRow, row)


def tokens_behind(connection: Connection, numbers: Iterable[int]) -> dict[int, int]:
    """Return the tokens behind each of these versions."""
    rows = connection.execute(
        select(versions.c.version, versions.c.tokens_total).where(
            versions.c.version.in_(list(numbers))
        )
    )
    return {version: tokens for version, tokens in rows}


def highest_number(connection: Connection) -> int:
    """Return the highest version number ever used, 0 before the first."""
    highest = connection.execute(select(func.max(versions.c.version))).scalar_one()
    return 0 if highest is None else int(highest)


def kept_versions(connection: Connection) -> list[VersionRow]:
    """Return every version that still has its blobs, oldest first."""
    rows = connection.execute(
        select(versions)
        .where(versions.c.pruned.is_(False))
        .order_by(versions.c.version)
    )
    return [typed(VersionRow, row) for row in rows]


def versions_of(connection: Connection, run_id: str) -> list[VersionRow]:
    """Return every version of a run, oldest first."""
    rows = connection.execute(
        select(versions).where(versions.c.run_id == run_id).order_by(versions.c.version)
    )
    return [typed(VersionRow, row) for row in rows]


def rollbacks_of(connection: Connection, run_id: str) -> list[VersionRow]:
    """Return the versions of a run that are earlier ones again, oldest first."""
    rows = connection.execute(
        select(versions)
        .where(versions.c.run_id == run_id, versions.c.rolled_back_to.is_not(None))
        .order_by(versions.c.version)
    )
    return [typed(VersionRow, row) for row in rows]


def of_other_kind(
    connection: Connection, run_id: str, round_kind: str, *, since: int = 0
) -> list[int]:
    """Return the versions that a round of another kind has made, oldest first.

    From the version `since` on. Neither the root nor an earlier version again is one.
    """
    # Plans from before there were two kinds do not name theirs.
    made_by = func.coalesce(
        func.json_extract(versions.c.plan_json, "$.round_kind"), RoundKind.DELTA
    )
    rows = connection.execute(
        select(versions.c.version)
        .where(
            versions.c.run_id == run_id,
            versions.c.version >= since,
            versions.c.round_id.is_not(None),
            made_by != round_kind,
        )
        .order_by(versions.c.version)
    )
    return [version for (version,) in rows]


def mark_pruned(connection: Connection, numbers: Iterable[int]) -> None:
    """Record that versions lose their blobs; done before the files go."""
    connection.execute(
        update(versions)
        .where(versions.c.version.in_(list(numbers)))
        .values(pruned=True)
    )


def mark_damaged(connection: Connection, version: int) -> None:
    """Record that a run could not go back to a version: its files are damaged."""
    connection.execute(
        update(versions).where(versions.c.version == version).values(damaged=True)
    )


def add_evaluation(connection: Connection, **columns: Any) -> None:
    """Insert the score of a version."""
    connection.execute(insert(evaluations).values(**columns))


def find_evaluation(connection: Connection, submission_id: str) -> EvaluationRow | None:
    """Return a score by the id under which it was submitted."""
    row = connection.execute(
        select(evaluations).where(evaluations.c.submission_id == submission_id)
    ).first()
    return None if row is None else typed(EvaluationRow, row)


def score_of(connection: Connection, version: int) -> EvaluationRow | None:
    """Return the lowest score of a version, None where it has none."""
    row = connection.execute(
        select(evaluations)
        .where(evaluations.c.version == version)
        .order_by(evaluations.c.nats / evaluations.c.tokens)
        .limit(1)
    ).first()
    return None if row is None else typed(EvaluationRow, row)


def scores_of(connection: Connection, run_id: str) -> list[ScoreRow]:
    """Return what the page shows of every score of a run, by version."""
    rows = connection.execute(
        _SCORES.where(evaluations.c.run_id == run_id).order_by(evaluations.c.version)
    )
    return [typed(ScoreRow, row) for row in rows]


def newest_score(connection: Connection, run_id: str) -> ScoreRow | None:
    """Return the score of the newest version that has one."""
    row = connection.execute(
        _SCORES.where(evaluations.c.run_id == run_id)
        .order_by(evaluations.c.version.desc())
        .limit(1)
    ).first()
    return None if row is None else typed(ScoreRow, row)


def count_versions(connection: Connection, run_id: str) -> int:
    """Return how many versions a run has."""
    count = select(func.count()).where(versions.c.run_id == run_id)
    return int(connection.execute(count).scalar_one())


def newest_evaluation_s(connection: Connection, run_id: str) -> float:
    """Return how long the score of a run's newest scored version took, 0 before any."""
    found = connection.execute(
        select(evaluations.c.compute_s)
        .where(evaluations.c.run_id == run_id)
        .order_by(evaluations.c.version.desc())
        .limit(1)
    ).scalar_one_or_none()
    return found or 0.0


def best_version(connection: Connection, run_id: str) -> int | None:
    """Return the version with the lowest held-out loss, None before any score."""
    return connection.execute(
        select(evaluations.c.version)
        .where(evaluations.c.run_id == run_id)
        .order_by(evaluations.c.nats / evaluations.c.tokens, evaluations.c.version)
        .limit(1)
    ).scalar_one_or_none()


def points_of(
    connection: Connection, run_id: str, *, newest: int | None = None
) -> list[PointRow]:
    """Return what the page shows of the versions of a run, oldest first.

    With `newest`, only so many of the last ones.
    """
    rows = connection.execute(
        _POINTS.where(versions.c.run_id == run_id)
        .order_by(versions.c.version.desc())
        .limit(newest)
    )
    return [typed(PointRow, row) for row in rows][::-1]


def some_points_of(
    connection: Connection,
    run_id: str,
    *,
    stride: int,
    all_from: int,
    always: Collection[int],
) -> list[PointRow]:
    """Return the same of those whose number `stride` divides, oldest first.

    Beside them all from `all_from` on, and those in `always`.
    """
    is_shown = or_(
        versions.c.version % stride == 0,
        versions.c.version >= all_from,
        versions.c.version.in_(always),
    )
    rows = connection.execute(
        _POINTS.where(versions.c.run_id == run_id, is_shown).order_by(
            versions.c.version
        )
    )
    return [typed(PointRow, row) for row in rows]
