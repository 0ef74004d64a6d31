"""The migrations make exactly the tables that the code describes."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, create_engine, inspect, text

from bitnet_ext.wire.messages import EXACT
from bitnet_ext.wire.verdicts import Optimiser
from coordinator.domain.errors import StartError
from coordinator.domain.plan import TrainingPlan
from coordinator.store import rounds, tallies, versions
from coordinator.store.engine import Store
from coordinator.store.schema import _config, migrate, schema_revision
from coordinator.store.tables import metadata


@pytest.fixture
def store(tmp_path: Path):
    store = Store(tmp_path / "fleet.db")
    yield store
    store.close()


def described(connection: Connection):
    """Return all that SQLite knows of each table, in an order of its own."""
    inspector = inspect(connection)
    return {
        table: {
            "columns": sorted(
                (c["name"], str(c["type"]), c["nullable"], c["default"])
                for c in inspector.get_columns(table)
            ),
            "key": inspector.get_pk_constraint(table)["constrained_columns"],
            "checks": sorted(
                (c["name"], c["sqltext"])
                for c in inspector.get_check_constraints(table)
            ),
            "foreign": sorted(
                (f["constrained_columns"], f["referred_table"], f["referred_columns"])
                for f in inspector.get_foreign_keys(table)
            ),
            "unique": sorted(
                u["column_names"] for u in inspector.get_unique_constraints(table)
            ),
            "indexes": sorted(
                (
                    i["name"],
                    i["unique"],
                    i["column_names"],
                    str(i.get("dialect_options", {}).get("sqlite_where")),
                )
                for i in inspector.get_indexes(table)
            ),
        }
        for table in inspector.get_table_names()
        if table != "alembic_version"
    }


def test_alembic_finds_nothing_left_to_migrate(store):
    store.write_now(migrate)

    def compare(connection):
        options = {"compare_type": True, "compare_server_default": True}
        context = MigrationContext.configure(connection, opts=options)
        return compare_metadata(context, metadata)

    assert store.read_now(compare) == []


def test_checks_and_partial_indexes_are_the_same_too(store, tmp_path):
    store.write_now(migrate)
    twin = Store(tmp_path / "twin.db")
    try:
        twin.write_now(metadata.create_all)

        due = twin.read_now(described)
    finally:
        twin.close()

    assert store.read_now(described) == due
    assert any(table["checks"] for table in due.values())


def test_migrating_again_changes_nothing(store):
    store.write_now(migrate)
    store.write_now(lambda c: c.execute(text("INSERT INTO facts VALUES ('a', 'b')")))

    store.write_now(migrate)

    rows = store.read_now(lambda c: list(c.execute(text("SELECT * FROM facts"))))
    assert rows == [("a", "b")]


def test_a_database_of_a_newer_version_is_refused_and_stays_as_it_is(store):
    store.write_now(migrate)
    store.write_now(
        lambda c: c.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    )

    with pytest.raises(StartError, match="'9999'") as caught:
        store.write_now(migrate)

    assert caught.value.exit_code == 2
    assert store.read_now(schema_revision) == "9999"


def test_an_empty_database_has_no_revision(store):
    store.write_now(lambda c: None)

    assert store.read_now(schema_revision) is None


def test_what_was_accepted_before_tallies_were_kept_is_in_them(tmp_path):
    # Without foreign keys, so that a few rows are enough.
    engine = create_engine(f"sqlite:///{tmp_path / 'old.db'}")
    with engine.begin() as connection:
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, "0002")
        for place, (worker_id, state, version) in enumerate(
            [("w1", "applied", 2), ("w1", "applied", 2), ("w2", "filtered", None)]
        ):
            row = {"submission_id": f"s{place}", "task_id": f"t{place}", "run_id": "r"}
            row |= {"worker_id": worker_id, "state": state, "version": version}
            _insert(connection, "submissions", row | {"tokens": 64})
        back = {"task_id": "t0", "worker_id": "w1", "num_tokens": 64}
        back |= {"outcome": "back", "ended_at": 9.0}
        _insert(connection, "claims", back)

        migrate(connection)

        found = tallies.tokens_by_worker(connection, "r")
        claim = connection.execute(text("SELECT * FROM claims")).one()
    engine.dispose()
    assert found == {"w1": {"applied": 128}, "w2": {"filtered": 64}}
    assert (claim.tokens_done, claim.progress_at) == (64, 9.0)


def test_what_runs_of_before_have_done_is_counted(tmp_path):
    engine = create_engine(f"sqlite:///{tmp_path / 'old.db'}")
    with engine.begin() as connection:
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, "0015")
        _insert(connection, "runs", {"run_id": "r", "state": "running", "epoch": 2})
        for place, (kind, state, epoch, fate) in enumerate(
            [
                ("train", "done", 1, "applied"),
                ("train", "done", 2, "applied"),
                ("train", "done", 2, "filtered"),
                ("train", "pending", 2, None),
                ("evaluate", "done", 2, None),
            ]
        ):
            row = {"task_id": f"t{place}", "run_id": "r", "epoch": epoch}
            _insert(connection, "tasks", row | {"kind": kind, "state": state})
            if fate is not None:
                version = 2 if fate == "applied" else None
                sent = {"submission_id": f"s{place}", "tokens": 64, "state": fate}
                _insert(connection, "submissions", row | sent | {"version": version})

        migrate(connection)

        run = connection.execute(text("SELECT * FROM runs")).one()
    engine.dispose()
    assert (run.tasks_done, run.epoch_tokens_accepted) == (3, 64)


def test_rounds_of_before_keep_the_round_time_of_their_plan(tmp_path):
    engine = create_engine(f"sqlite:///{tmp_path / 'old.db'}")
    with engine.begin() as connection:
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, "0007")
        for number, (run_id, round_s) in enumerate([("r", 12.5), ("s", 60.0)]):
            run = {"run_id": run_id, "state": "running"}
            _insert(connection, "runs", run | {"plan_json": f'{{"round_s":{round_s}}}'})
            live = {"round_id": number, "run_id": run_id, "state": "open"}
            _insert(connection, "rounds", live)

        migrate(connection)

        live = rounds.live_round(connection, "r")
        other = rounds.live_round(connection, "s")
    engine.dispose()
    assert (live.round_s, live.overhead_s, live.shortest_s) == (12.5, None, None)
    assert other.round_s == 60.0


def test_runs_of_before_go_on_with_adamw(tmp_path):
    engine = create_engine(f"sqlite:///{tmp_path / 'old.db'}")
    with engine.begin() as connection:
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, "0011")
        plan = {"run_id": "r", "plan_json": '{"learning_rate":0.25}'}
        _insert(connection, "runs", plan | {"state": "running"})
        _insert(connection, "versions", plan)

        migrate(connection)

        (run_plan,) = connection.execute(text("SELECT plan_json FROM runs")).one()
        (its_plan,) = connection.execute(text("SELECT plan_json FROM versions")).one()
    engine.dispose()
    assert run_plan == its_plan
    plan = msgspec.json.decode(run_plan, type=TrainingPlan)
    assert plan == TrainingPlan(
        local_optimiser=Optimiser.ADAMW, broadcast=EXACT, learning_rate=0.25
    )
    assert TrainingPlan().local_optimiser is Optimiser.MUON


def test_plans_from_before_there_were_links_are_exact_and_others_stay(tmp_path):
    engine = create_engine(f"sqlite:///{tmp_path / 'old.db'}")
    with engine.begin() as connection:
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, "0014")
        for run_id, plan in (("old", "{}"), ("links", '{"broadcast":"ternary"}')):
            of = {"run_id": run_id, "plan_json": plan, "state": "running"}
            _insert(connection, "runs", of)

        migrate(connection)

        found = connection.execute(text("SELECT run_id, plan_json FROM runs"))
        plans = {
            run_id: msgspec.json.decode(plan, type=TrainingPlan).broadcast
            for run_id, plan in found
        }
    engine.dispose()
    assert plans == {"old": EXACT, "links": "ternary"}
    assert TrainingPlan().broadcast == "int8"


def test_versions_that_events_call_damaged_are_so(tmp_path):
    engine = create_engine(f"sqlite:///{tmp_path / 'old.db'}")
    with engine.begin() as connection:
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, "0012")
        for version in (1, 2):
            of = {"run_id": "r", "version": version, "parent": version - 1}
            _insert(connection, "versions", of | {"pruned": 0})
        refused = {"kind": "rollback.refused", "body_json": '{"to_version":2}'}
        _insert(connection, "events", refused)

        migrate(connection)

        found = {row.version: row.damaged for row in versions.kept_versions(connection)}
    engine.dispose()
    assert found == {1: False, 2: True}


def _insert(connection: Connection, table: str, row: dict[str, object]) -> None:
    """Insert a row; what it does not name and must not be empty is 1."""
    columns = inspect(connection).get_columns(table)
    ones = {c["name"]: 1 for c in columns if not c["nullable"]}
    given = ones | row
    names = ", ".join(given)
    values = ", ".join(f":{name}" for name in given)
    statement = f"INSERT INTO {table} ({names}) VALUES ({values})"
    connection.execute(text(statement), given)
