"""Brings a database to the newest schema, and refuses one that is newer still."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from coordinator.domain.errors import EXIT_DAMAGED, StartError
from coordinator.store.blobs import BlobKind


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config


def schema_revision(connection: Connection) -> str | None:
    """Return the revision that a database has; None for an empty one."""
    return MigrationContext.configure(connection).get_current_revision()


def has_tables(connection: Connection, folder: Path) -> bool:
    """Return whether the database of a data folder was ever begun.

    Raises StartError where it was not although the folder holds files of a run: to
    begin anew would make orphans of all weights, and remove them.
    """
    if schema_revision(connection) is not None:
        return True
    if any(any((folder / kind).glob("*")) for kind in BlobKind):
        raise StartError(
            f"the database in {folder} is empty or gone, the files of its run are "
            "there: restore it from a backup",
            exit_code=EXIT_DAMAGED,
        )
    return False


def check_newest(connection: Connection) -> None:
    """Raise StartError for a database that is not of the newest schema.

    For whoever only reads: an older one has not the columns that the code names.
    """
    newest = ScriptDirectory.from_config(_config()).get_current_head()
    found = schema_revision(connection)
    if found != newest:
        raise StartError(
            f"the database has schema {found!r}, this version reads {newest!r}: "
            "`bitnet-coordinator serve` brings an older one there, and a newer one "
            "needs the version that wrote it"
        )


def migrate(connection: Connection) -> None:
    """Run every missing step, all in the caller's transaction.

    Raises StartError for a database written by a newer version of this program.
    """
    config = _config()
    scripts = ScriptDirectory.from_config(config)
    known = {script.revision for script in scripts.walk_revisions()}
    found = schema_revision(connection)
    if found is not None and found not in known:
        raise StartError(
            f"the database has schema {found!r}, which this version does not know; "
            f"use the version that wrote it, or restore a backup"
        )
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
