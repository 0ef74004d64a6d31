"""What workers ask for all the time is asked of the database by statements made once.

To make one takes as long as to run it.
"""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import event

from tests.unit.coordinator.fleets import World


def made_anew(world: World, act: Callable[[], object]) -> list[str]:
    """Return the statements of `act` that were made for it alone, as SQL."""
    kept = []

    def keep(_connection, statement, *_rest):
        kept.append(statement)

    # Objects are kept, so that no new one has the identity of an old one.
    event.listen(world.fleet.store._writer, "before_execute", keep)
    act()
    before = {id(statement) for statement in kept}
    seen = len(kept)
    act()
    return [str(one) for one in kept[seen:] if id(one) not in before]


def test_a_heartbeat_makes_no_statement(running: World) -> None:
    running.submit(running.claimed())
    running.close_round()
    task = running.claimed()
    tokens = iter(range(1, 100))

    def beat() -> None:
        running.heartbeat(task, tokens_done=next(tokens))

    assert made_anew(running, beat) == []


def test_a_claim_makes_none_but_to_cut_a_range_and_to_lease(running: World) -> None:
    names = iter(["w2", "w3"])
    for name in ("w2", "w3"):
        running.register(name)
    running.claimed("w1")

    found = made_anew(running, lambda: running.claimed(next(names)))

    assert [one.split()[:2] for one in found] == [
        ["UPDATE", "ranges"],
        ["UPDATE", "tasks"],
    ]
