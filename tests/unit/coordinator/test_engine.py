"""One writer thread, readers that cannot write, and commits that last."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import IntegrityError, OperationalError

from bitnet_ext.wire.verdicts import ErrorCode
from coordinator.domain.errors import RefusedError
from coordinator.store.engine import MOST_TOGETHER, Store, read_once

TIMEOUT_S = 10.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    # Characters that a careless URL would trip over.
    return tmp_path / "a fleet?&#%41.db"


@pytest.fixture
def store(path: Path):
    store = Store(path)
    store.write_now(lambda c: c.execute(text("CREATE TABLE n (v INTEGER NOT NULL)")))
    store.write_now(lambda c: c.execute(text("INSERT INTO n VALUES (0)")))
    yield store
    store.close()


def value(connection):
    return connection.execute(text("SELECT v FROM n")).scalar_one()


def set_value(connection, number):
    connection.execute(text("UPDATE n SET v = :v"), {"v": number})


def pragma(store, name, *, reading=False):
    run = store.read_now if reading else store.write_now
    return run(lambda c: c.exec_driver_sql(f"PRAGMA {name}").scalar_one())


def test_the_file_is_the_one_that_was_named(store, path):
    assert path.exists()


def test_a_reader_cannot_write(store):
    with pytest.raises(OperationalError, match="readonly"):
        store.read_now(lambda c: set_value(c, 1))

    assert store.read_now(value) == 0


def test_commits_survive_a_power_cut_and_foreign_keys_hold(store):
    assert pragma(store, "journal_mode") == "wal"
    assert pragma(store, "synchronous") == 2
    assert pragma(store, "foreign_keys") == 1
    assert pragma(store, "query_only", reading=True) == 1
    # The writer alone checkpoints.
    assert pragma(store, "wal_autocheckpoint", reading=True) == 0


def test_what_was_written_is_there_for_another_process_at_once(store, path):
    store.write_now(lambda c: set_value(c, 5))

    assert read_once(path, value) == 5


def test_a_full_disk_is_a_refusal_and_a_later_try_succeeds(store):
    size = pragma(store, "page_count")
    pragma(store, f"max_page_count={size}")  # what SQLite calls full

    with pytest.raises(RefusedError, match="full") as caught:
        store.write_now(
            lambda c: c.exec_driver_sql("CREATE TABLE more AS SELECT zeroblob(99999)")
        )

    assert caught.value.code is ErrorCode.DISK_LOW
    assert caught.value.retry_after_s
    pragma(store, f"max_page_count={size + 99}")
    store.write_now(lambda c: set_value(c, 5))
    assert store.read_now(value) == 5


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_takes_the_whole_transaction_back(store, error):
    def half_done(connection):
        set_value(connection, 1)
        raise error

    with pytest.raises(error):
        store.write_now(half_done)

    assert store.read_now(value) == 0
    store.write_now(lambda c: set_value(c, 2))
    assert store.read_now(value) == 2


def test_a_broken_rule_takes_the_whole_transaction_back(store):
    def break_rule(connection):
        set_value(connection, 1)
        set_value(connection, None)

    with pytest.raises(IntegrityError):
        store.write_now(break_rule)

    assert store.read_now(value) == 0


def test_eight_tasks_share_one_writer_thread_and_lose_no_update(store):
    threads = set()

    def add_one(connection):
        threads.add(threading.get_ident())
        set_value(connection, value(connection) + 1)

    async def many_times():
        for _ in range(10):
            await store.write(add_one)

    async def story():
        await asyncio.gather(*(many_times() for _ in range(8)))

    asyncio.run(story())

    assert store.read_now(value) == 80
    assert len(threads) == 1
    assert threading.get_ident() not in threads


async def hold_the_writer(store):
    """Let the writer be busy until the gate is set; return gate and write."""
    gate, begun = threading.Event(), threading.Event()

    def hold(_connection):
        begun.set()
        gate.wait(TIMEOUT_S)

    first = asyncio.ensure_future(store.write(hold))
    await asyncio.to_thread(begun.wait, TIMEOUT_S)
    return gate, first


def together(store, *acts):
    """Let writes wait for the writer at the same time; return what came of each.

    Also how many commits they took.
    """
    commits = []
    event.listen(store._writer, "commit", commits.append)

    async def story():
        gate, first = await hold_the_writer(store)
        rest = [asyncio.ensure_future(store.write(act)) for act in acts]
        await asyncio.sleep(0)
        gate.set()
        return (await asyncio.gather(first, *rest, return_exceptions=True))[1:]

    outcomes = asyncio.run(story())
    return outcomes, len(commits) - 1


def add_one(connection):
    connection.execute(text("UPDATE n SET v = v + 1"))
    return value(connection)


def test_writes_that_wait_share_one_commit(store):
    outcomes, num_commits = together(store, *[add_one] * 10)

    assert outcomes == list(range(1, 11))
    assert num_commits == 1
    assert store.read_now(value) == 10


def test_no_commit_is_shared_by_more_than_its_limit(store):
    _, num_commits = together(store, *[add_one] * (MOST_TOGETHER + 1))

    assert num_commits == 2


def test_of_writes_that_share_a_commit_one_that_fails_is_undone_alone(store):
    def fail(connection):
        set_value(connection, 77)
        raise KeyError("mine")

    def break_a_rule(connection):
        set_value(connection, 88)
        set_value(connection, None)

    outcomes, _ = together(store, add_one, fail, break_a_rule, add_one)

    assert outcomes[0] == 1
    assert isinstance(outcomes[1], KeyError)
    assert isinstance(outcomes[2], IntegrityError)
    assert outcomes[3] == 2
    assert store.read_now(value) == 2


def test_nobody_is_told_of_success_where_the_transaction_is_taken_back(store):
    def take_all_back(connection):
        # As SQLite does by itself, for one, when the disk is full.
        connection.exec_driver_sql("ROLLBACK")
        raise RuntimeError("no room")

    outcomes, _ = together(store, add_one, take_all_back, add_one)

    assert [type(one) for one in outcomes] == [RuntimeError] * 3
    assert store.read_now(value) == 0
    assert store.write_now(add_one) == 1  # the next one is fine


def test_a_write_that_is_cancelled_while_it_waits_is_not_made(store):
    async def story():
        gate, first = await hold_the_writer(store)
        waiting = asyncio.ensure_future(store.write(add_one))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        await asyncio.sleep(0)  # it is told to the writer
        gate.set()
        await first

    asyncio.run(story())

    assert store.read_now(value) == 0


def test_a_write_in_progress_neither_blocks_readers_nor_shows(store):
    written, go_on = threading.Event(), threading.Event()

    def slow(connection):
        set_value(connection, 1)
        written.set()
        assert go_on.wait(TIMEOUT_S)

    async def story():
        writing = asyncio.ensure_future(store.write(slow))
        await asyncio.to_thread(written.wait, TIMEOUT_S)
        during = await asyncio.wait_for(store.read(value), TIMEOUT_S)
        go_on.set()
        await writing
        return during, await store.read(value)

    assert asyncio.run(story()) == (0, 1)


def test_a_reader_sees_one_snapshot_while_writes_go_on(store):
    looked, go_on = threading.Event(), threading.Event()

    def look_twice(connection):
        first = value(connection)
        looked.set()
        assert go_on.wait(TIMEOUT_S)
        return first, value(connection)

    async def story():
        reading = asyncio.ensure_future(store.read(look_twice))
        await asyncio.to_thread(looked.wait, TIMEOUT_S)
        await store.write(lambda c: set_value(c, 1))
        go_on.set()
        return await reading

    assert asyncio.run(story()) == (0, 0)


def test_closing_leaves_one_file_that_holds_everything(path):
    store = Store(path)
    store.write_now(lambda c: c.execute(text("CREATE TABLE n (v INTEGER)")))
    store.write_now(lambda c: c.execute(text("INSERT INTO n VALUES (3)")))
    store.read_now(value)

    store.close()

    leftovers = [p.name for p in path.parent.iterdir() if p.stat().st_size]
    assert leftovers == [path.name]
    assert read_once(path, value) == 3
