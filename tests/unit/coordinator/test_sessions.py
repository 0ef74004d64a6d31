"""Sessions and the first password, on a real SQLite file; time is an argument."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import func, select

from coordinator.login.passwords import (
    MAX_PASSWORD_CHARS,
    MAX_WAITING,
    BusyError,
    PasswordChecker,
    ensure_admin_password,
    hash_password,
    password_matches,
    reset_admin_password,
)
from coordinator.login.sessions import (
    ABSOLUTE_S,
    IDLE_S,
    TOUCH_S,
    Operator,
    begin_session,
    find_operator,
    forget_session,
)
from coordinator.store.engine import Store
from coordinator.store.sessions import find_password_hash, find_session
from coordinator.store.system import SystemRng
from coordinator.store.tables import metadata, secrets, sessions

ADMIN = Operator("admin")
START = 1_800_000_000.0


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "fleet.db")
    store.write_now(metadata.create_all)
    yield store
    store.close()


def begin(store: Store, at: float = START, old_cookie: str | None = None) -> str:
    return asyncio.run(
        begin_session(store, ADMIN, old_cookie=old_cookie, at=at, rng=SystemRng())
    )


def find(
    store: Store, cookie: str | None, at: float, *, touch: bool = True
) -> Operator | None:
    return asyncio.run(find_operator(store, cookie, at=at, touch=touch))


def num_sessions(store: Store) -> int:
    return store.read_now(
        lambda c: c.execute(select(func.count()).select_from(sessions)).scalar_one()
    )


def test_a_session_is_found_by_its_cookie_and_by_no_other(store: Store) -> None:
    cookie = begin(store)

    assert find(store, cookie, START) == ADMIN
    assert find(store, begin(store) + "x", START) is None
    assert find(store, "A" * 43, START) is None
    assert find(store, "' OR 1=1 --", START) is None
    assert find(store, None, START) is None


def test_the_cookie_itself_is_never_stored(store: Store) -> None:
    cookie = begin(store)

    rows = store.read_now(lambda c: list(c.execute(select(sessions))))

    assert len(cookie) == 43  # 256 bits
    assert cookie not in repr(rows)


def test_a_session_ends_after_eight_idle_hours(store: Store) -> None:
    cookie = begin(store)

    assert find(store, cookie, START + IDLE_S - 1, touch=False) == ADMIN
    assert find(store, cookie, START + IDLE_S) is None


def test_use_keeps_a_session_but_not_beyond_seven_days(store: Store) -> None:
    cookie = begin(store)
    step = IDLE_S / 2

    used = 0.0
    while used + step < ABSOLUTE_S:
        used += step
        assert find(store, cookie, START + used) == ADMIN

    assert find(store, cookie, START + ABSOLUTE_S) is None


def test_looking_without_touching_does_not_keep_a_session(store: Store) -> None:
    cookie = begin(store)

    for minute in range(0, 8 * 60, 10):
        assert find(store, cookie, START + 60.0 * minute, touch=False) == ADMIN

    assert find(store, cookie, START + IDLE_S, touch=False) is None


def test_use_is_noted_once_a_minute_and_not_more(store: Store) -> None:
    cookie = begin(store)
    key = store.read_now(lambda c: c.execute(select(sessions.c.session_hash)).scalar())

    seen = []
    for later in (TOUCH_S - 1, TOUCH_S, TOUCH_S + 1):
        find(store, cookie, START + later)
        row = store.read_now(lambda c: find_session(c, key))
        seen.append(row.seen_at - START)

    assert seen == [0, TOUCH_S, TOUCH_S]


def test_a_new_login_ends_the_session_that_the_browser_brought(store: Store) -> None:
    old = begin(store)
    other = begin(store)

    new = begin(store, old_cookie=old)

    assert new != old
    assert find(store, old, START) is None
    assert find(store, new, START) == ADMIN
    assert find(store, other, START) == ADMIN


def test_a_new_login_sweeps_out_what_has_expired(store: Store) -> None:
    begin(store)
    begin(store, at=START + IDLE_S - 1)

    begin(store, at=START + IDLE_S + 1)

    assert num_sessions(store) == 2


def test_a_session_that_has_ended_stays_ended(store: Store) -> None:
    cookie = begin(store)

    asyncio.run(forget_session(store, cookie))
    asyncio.run(forget_session(store, cookie))

    assert find(store, cookie, START + TOUCH_S) is None
    assert num_sessions(store) == 0


def test_the_first_password_is_made_once_and_only_its_hash_is_kept(
    store: Store,
) -> None:
    first = asyncio.run(ensure_admin_password(store, SystemRng()))
    second = asyncio.run(ensure_admin_password(store, SystemRng()))

    assert first is not None
    assert second is None
    kept = store.read_now(lambda c: list(c.execute(select(secrets))))
    assert first not in repr(kept)
    stored = store.read_now(find_password_hash)
    assert stored.startswith("$argon2id$")
    assert password_matches(stored, first)
    assert not password_matches(stored, first[:-1])


def test_a_reset_replaces_the_password_and_ends_every_session(store: Store) -> None:
    old = asyncio.run(ensure_admin_password(store, SystemRng()))
    begin(store)
    checker = PasswordChecker(store)

    store.write_now(lambda c: reset_admin_password(c, "correct horse"))

    assert asyncio.run(checker.is_right("correct horse"))
    assert not asyncio.run(checker.is_right(old))
    assert num_sessions(store) == 0


@pytest.mark.parametrize("length", [0, MAX_PASSWORD_CHARS + 1])
def test_a_password_that_could_never_be_entered_is_refused(
    store: Store, length: int
) -> None:
    with pytest.raises(ValueError, match=f"got {length}"):
        store.write_now(lambda c: reset_admin_password(c, "x" * length))

    assert store.read_now(find_password_hash) is None


def test_without_a_password_nobody_gets_in(store: Store) -> None:
    assert not asyncio.run(PasswordChecker(store).is_right(""))


class SlowDatabase:
    """Answers no read before `go` is set."""

    def __init__(self) -> None:
        self.go = asyncio.Event()

    async def read(self, act: object) -> None:
        await self.go.wait()

    async def write(self, act: object) -> None:
        raise AssertionError("nothing is written")


def test_only_so_many_passwords_wait_to_be_checked() -> None:
    async def story() -> None:
        database = SlowDatabase()
        checker = PasswordChecker(database)
        async with asyncio.TaskGroup() as group:
            for _ in range(MAX_WAITING):
                group.create_task(checker.is_right("guess"))
            await asyncio.sleep(0)  # they have begun

            with pytest.raises(BusyError):
                await checker.is_right("guess")
            database.go.set()

        assert not await checker.is_right("guess")  # there is room again

    asyncio.run(story())


def test_a_monstrous_password_is_not_even_hashed() -> None:
    long = "x" * (MAX_PASSWORD_CHARS + 1)

    assert not password_matches(hash_password(long), long)
