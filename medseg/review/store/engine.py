"""Opening the database: the engine with its settings, and the schema brought up to date."""

from __future__ import annotations

import logging
import sqlite3
import time
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Engine, create_engine, event, inspect, make_url
from sqlalchemy.engine import Connection
from sqlalchemy.exc import ArgumentError, DBAPIError

from medseg.errors import DeviceError, InputError, UsageError
from medseg.review.store.postgres import postgres_engine

log = logging.getLogger(__name__)

BUSY_SECONDS = 30
"""How long a write of SQLite waits for others: its waiting is not in order of arrival, so this is well above a save."""

_MIGRATIONS = Path(__file__).parent / "migrations"
_MIGRATION_LOCK = 0x6D656473


def open_database(url: str) -> Engine:
    """Connect to a database, and create or upgrade its tables.

    Args:
        url: as SQLAlchemy takes it: ``sqlite:///FILE`` or ``postgresql://USER@HOST/NAME``.

    Returns:
        An engine whose transactions on SQLite take the write lock at once, unless the connection has the execution
        option ``read``.

    Raises:
        UsageError: the address is not one of the two kinds.
        InputError: no connection; the file is no database or damaged; or a newer medseg made the tables.
        DeviceError: PostgreSQL's client package is missing.
    """
    address = _address(url)
    shown = address.render_as_string(hide_password=True)
    if address.drivername == "sqlite":
        engine = create_engine(address, connect_args={"timeout": BUSY_SECONDS, "isolation_level": None})
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    else:
        try:
            engine = postgres_engine(address)
        except ImportError as err:
            raise DeviceError(shown, "pg8000 is not installed", "pip install 'medseg[app]'") from err
    try:
        with engine.begin() as connection:
            _upgrade(connection, shown)
    except (DBAPIError, OSError) as err:
        engine.dispose()
        problem = f"the review database cannot be used ({_cause(err)})"
        raise InputError(shown, problem, "check address and file") from err
    except BaseException:
        engine.dispose()
        raise
    return engine


def _address(url: str) -> URL:
    try:
        address = make_url(url)
    except ArgumentError as err:
        raise UsageError("database address", "not understood", "sqlite:///FILE or postgresql://USER@HOST/NAME") from err
    if address.get_backend_name() == "postgresql":
        return address
    if address.drivername != "sqlite" or not address.database or address.database == ":memory:":
        raise UsageError(
            address.render_as_string(hide_password=True),
            "neither a file of SQLite nor PostgreSQL",
            "sqlite:///FILE or postgresql://USER@HOST/NAME",
        )
    return address


def _cause(err: DBAPIError | OSError) -> str:
    """What went wrong, on one line."""
    if isinstance(err, OSError):
        return err.strerror or str(err)
    told = err.orig.args[0] if err.orig is not None and err.orig.args else ""
    text = told.get("M", "") if isinstance(told, dict) else str(told)  # PostgreSQL's message comes as fields
    return next(iter(text.strip().splitlines()), "") or "unknown cause"


def _prepare_sqlite(connection: Any, _record: object) -> None:
    """Set what SQLite forgets with every connection."""
    cursor = connection.cursor()
    _write_ahead(cursor)
    cursor.execute("PRAGMA synchronous=FULL")  # a signed verdict outlives a power cut
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _write_ahead(cursor: Any) -> None:
    """Turn on the write-ahead log. SQLite does not wait for others here, and on a new file several may turn it on."""
    until = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as err:
            if err.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(0.02)
        else:
            return


def _begin_sqlite(connection: Connection) -> None:
    """Take the write lock at the beginning: a lock that is asked for halfway fails instead of waiting."""
    read = connection.get_execution_options().get("read", False)
    connection.exec_driver_sql("BEGIN" if read else "BEGIN IMMEDIATE")


def _upgrade(connection: Connection, shown: str) -> None:
    """Run the migrations that the database lacks; two processes that start together take turns.

    Raises:
        InputError: the database is of a newer version.
    """
    from alembic import command
    from alembic.config import Config
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})")
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    found = MigrationContext.configure(connection).get_current_revision()
    if found is not None and found not in known:
        raise InputError(shown, f"made by a newer medseg (schema {found})", "update medseg, or use another database")
    if found is None and "cases" in inspect(connection).get_table_names():
        raise InputError(shown, "holds tables of another program", "use another database")
    command.upgrade(config, "head")
    log.debug("review database at schema %s", MigrationContext.configure(connection).get_current_revision())
