"""Opening the file of a store, and checking that it is one."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout

from tokenprune.errors import InputError
from tokenprune.sweeps.store.answer_tables import ANSWER_TABLES
from tokenprune.sweeps.store.problems import FILE, told
from tokenprune.sweeps.store.tables import SCHEMA, VERSION, Store
from tokenprune.utils.arguments import shown
from tokenprune.utils.files import path_given, reason

__all__ = ["FILE", "reading", "writing"]

WITHOUT_ANSWERS = 2  # the version before the tables of answers; all else is the same


@contextmanager
def reading(folder: str | Path) -> Iterator[Store]:
    """A store to read from, also while a sweep writes to it.

    Raises:
        InputError: there is none, it is damaged, or of another version.
    """
    home = path_given("folder of a sweep", folder)
    path = home / FILE
    try:
        exists, compared = path.is_file(), (home / "results.json").is_file()
    except OSError as error:
        raise InputError(f"{shown(str(folder))} cannot be read ({reason(error)}); check the path") from error
    cure = "it is of `tokenprune compare`; make one with `tokenprune sweep`" if compared else "check the path"
    empty = InputError(f"{str(folder)!r} holds no results of a sweep ({FILE}); {cure}")
    if not exists:
        raise empty
    with told(home), closing(_opened(path)) as connection:
        if _is_empty(connection):
            raise empty
        if _check(connection, home) == WITHOUT_ANSWERS:
            connection.execute("PRAGMA temp_store = MEMORY")
            connection.executescript(ANSWER_TABLES.replace("CREATE TABLE", "CREATE TEMP TABLE"))
        yield Store(home, connection)


def _opened(path: Path) -> sqlite3.Connection:
    """A connection to read with, also where no file can be made beside the store, which SQLite's log needs."""
    address = f"{path.absolute().as_uri()}?mode=ro"
    connection = sqlite3.connect(address, uri=True)
    try:
        _is_empty(connection)
    except sqlite3.OperationalError as error:
        connection.close()
        log = path.with_name(f"{path.name}-wal")
        if ("open" not in str(error) and "readonly" not in str(error)) or (log.exists() and log.stat().st_size):
            raise
        return sqlite3.connect(f"{address}&immutable=1", uri=True)
    return connection


@contextmanager
def writing(folder: str | Path) -> Iterator[Store]:
    """A store to add to, made if there is none.

    Raises:
        InputError: another process writes to it, it is damaged, of another version, or cannot be written.
    """
    home = path_given("folder of a sweep", folder)
    with _locked(home, folder):
        with told(home):
            connection = sqlite3.connect(home / FILE, isolation_level=None, timeout=60)
        with closing(connection):
            with told(home):
                is_new = _is_empty(connection)
                missing = SCHEMA + ANSWER_TABLES if is_new else ""
                if not is_new and _check(connection, home) == WITHOUT_ANSWERS:
                    missing = ANSWER_TABLES
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = FULL")
                if missing:
                    connection.executescript(f"BEGIN; {missing} PRAGMA user_version = {VERSION}; COMMIT;")
            yield Store(home, connection)


@contextmanager
def _locked(home: Path, folder: str | Path) -> Iterator[None]:
    """The only writer of a folder; the system takes the lock back when the process dies."""
    lock = FileLock(home / ".lock")
    with told(home):
        home.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise InputError(
                f"{str(folder)!r} is being written by another process; wait for it, or give another folder"
            ) from None
    try:
        yield
    finally:
        lock.release()


def _is_empty(connection: sqlite3.Connection) -> bool:
    """Whether nothing was ever stored: a process died before the tables were made."""
    return not connection.execute("SELECT 1 FROM sqlite_master").fetchone()


def _check(connection: sqlite3.Connection, home: Path) -> int:
    """The version of a store, after a check that it is one."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version not in (WITHOUT_ANSWERS, VERSION):
        raise InputError(
            f"{str(home / FILE)!r} is of version {version}, expected {VERSION}; read it with the release of tokenprune "
            "that made it, or start a new folder"
        )
    (state,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if state != "ok":
        raise sqlite3.DatabaseError(state)
    found = _columns(connection)
    for table, columns in _expected_columns(version).items():
        if found.get(table) != columns:
            what = "another" if table in found else "no"
            raise InputError(
                f"{str(home / FILE)!r} is not the store of a sweep: it has {what} table {table!r}; give another folder"
            )
    return int(version)


def _columns(connection: sqlite3.Connection) -> dict[str, list[str]]:
    """By table."""
    tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    asked = "SELECT name FROM pragma_table_info(?) ORDER BY cid"
    return {table: [name for (name,) in connection.execute(asked, (table,))] for table in tables}


@cache
def _expected_columns(version: int) -> dict[str, list[str]]:
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(SCHEMA if version == WITHOUT_ANSWERS else SCHEMA + ANSWER_TABLES)
        return _columns(connection)
