"""Tokens that workers have trained, by what became of them."""

from __future__ import annotations

from collections import defaultdict

from sqlalchemy import Connection, func, insert, select, update

from coordinator.store.tables import tallies


def add_tokens(
    connection: Connection, *, run_id: str, worker_id: str, fate: str, tokens: int
) -> None:
    """Count tokens of a worker under a fate; negative ones are taken off again."""
    if not tokens:
        return
    done = connection.execute(
        update(tallies)
        .where(
            tallies.c.run_id == run_id,
            tallies.c.worker_id == worker_id,
            tallies.c.fate == fate,
        )
        .values(tokens=tallies.c.tokens + tokens)
    )
    if done.rowcount == 0:
        connection.execute(
            insert(tallies).values(
                run_id=run_id, worker_id=worker_id, fate=fate, tokens=tokens
            )
        )


def tokens_by_worker(connection: Connection, run_id: str) -> dict[str, dict[str, int]]:
    """Return the tokens of a run by worker and fate."""
    rows = connection.execute(
        select(tallies.c.worker_id, tallies.c.fate, tallies.c.tokens).where(
            tallies.c.run_id == run_id
        )
    )
    found: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for worker_id, fate, tokens in rows:
        found[worker_id][fate] = int(tokens)
    return dict(found)


def tokens_of_run(connection: Connection, run_id: str) -> dict[str, int]:
    """Return the tokens of all workers of a run, by fate."""
    rows = connection.execute(
        select(tallies.c.fate, func.sum(tallies.c.tokens))
        .where(tallies.c.run_id == run_id)
        .group_by(tallies.c.fate)
    )
    return {fate: int(tokens) for fate, tokens in rows}
