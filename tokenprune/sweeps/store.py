"""The store of a sweep: one SQLite file, one transaction for each scene, one writer at a time.

A transaction holds all records of one scene, so whatever moment a process dies at, a scene is there with all of its
queries or not at all. The file can be read while a sweep writes to it.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tokenprune.datasets.base import Scene
from tokenprune.errors import InputError
from tokenprune.evaluation.records import Record, packed_json, packed_mask
from tokenprune.sweeps.plan import Configuration
from tokenprune.utils.files import path_given, reason

FILE = "results.sqlite"
VERSION = 1
SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE environments (hash TEXT PRIMARY KEY, made TEXT NOT NULL, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE configurations (
    hash TEXT PRIMARY KEY, model TEXT NOT NULL, dataset TEXT NOT NULL, split TEXT NOT NULL, protocol TEXT NOT NULL,
    strategy TEXT NOT NULL, label TEXT NOT NULL, given TEXT NOT NULL, budget REAL, seed INTEGER NOT NULL,
    options TEXT, policies TEXT, reason TEXT
) WITHOUT ROWID;
CREATE TABLE scenes (
    source TEXT NOT NULL, scene INTEGER NOT NULL, name TEXT NOT NULL, digest TEXT NOT NULL, queries INTEGER NOT NULL,
    PRIMARY KEY (source, scene)
) WITHOUT ROWID;
CREATE TABLE records (
    configuration TEXT NOT NULL REFERENCES configurations (hash), scene INTEGER NOT NULL, query INTEGER NOT NULL,
    sample TEXT NOT NULL, scene_name TEXT NOT NULL, scene_digest TEXT NOT NULL, text TEXT NOT NULL, kind TEXT NOT NULL,
    size TEXT, height INTEGER NOT NULL, width INTEGER NOT NULL,
    intersection INTEGER NOT NULL, "union" INTEGER NOT NULL, predicted INTEGER NOT NULL, iou REAL NOT NULL,
    agreement_intersection INTEGER NOT NULL, agreement_union INTEGER NOT NULL, coverage REAL,
    image_tokens INTEGER NOT NULL, equivalent_tokens REAL NOT NULL, layers TEXT NOT NULL,
    flops REAL NOT NULL, flops_by_part TEXT NOT NULL, kv_bytes REAL NOT NULL, milliseconds TEXT NOT NULL,
    metrics TEXT NOT NULL, mask BLOB, stages BLOB, environment TEXT NOT NULL REFERENCES environments (hash),
    PRIMARY KEY (configuration, scene, query)
) WITHOUT ROWID;
"""


class Store:
    """An open store. Make one with `reading` or `writing`."""

    def __init__(self, folder: Path, connection: sqlite3.Connection) -> None:
        self.folder, self._connection = folder, connection

    # what is there ----------------------------------------------------------------------------------------------------

    def meta(self) -> dict[str, Any]:
        """Plain data by key, such as "config" and "planned"."""
        return {key: json.loads(value) for key, value in self.rows("SELECT key, value FROM meta")}

    def done(self, configuration: str) -> dict[int, int]:
        """By scene, how many queries of it are stored for a configuration."""
        found = "SELECT scene, COUNT(*) FROM records WHERE configuration = ? GROUP BY scene"
        return dict(self.rows(found, (configuration,)))

    def scenes(self, source: str) -> dict[int, str]:
        """The digests of the scenes of a source that were run, by number."""
        return dict(self.rows("SELECT scene, digest FROM scenes WHERE source = ?", (source,)))

    def count(self) -> int:
        """Records in all."""
        ((found,),) = self.rows("SELECT COUNT(*) FROM records")
        return int(found)

    def rows(self, query: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        """The result of a SELECT."""
        with told(self.folder):
            return self._connection.execute(query, values)

    # what is added ----------------------------------------------------------------------------------------------------

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing of what is added inside; on disk at its end."""
        with told(self.folder), self._connection:  # which commits, or takes everything back
            self._connection.execute("BEGIN IMMEDIATE")
            yield

    def set_meta(self, **values: Any) -> None:
        """Store plain data by key."""
        rows = [(key, json.dumps(value)) for key, value in values.items()]
        self._connection.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", rows)

    def add_environment(self, hashed: str, value: Mapping[str, Any]) -> None:
        """Store where and with what records are made."""
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        row = (hashed, now, json.dumps(value, sort_keys=True))
        self._connection.execute("INSERT OR IGNORE INTO environments VALUES (?, ?, ?)", row)

    def add_configuration(self, one: Configuration) -> None:
        """Store a configuration, unless it is there; what could not run before may be tried again."""
        strategy, given = one.contender.strategy, json.dumps(one.contender.given, sort_keys=True, default=repr)
        row = (one.hash, one.model, one.dataset, one.split, one.protocol, strategy.name, one.contender.label, given)
        places = ", ".join("?" * 13)
        self._connection.execute(
            f"INSERT OR IGNORE INTO configurations VALUES ({places})",
            (*row, one.contender.budget, one.seed, None, None, None),
        )
        self.set_configuration(one.hash, reason=None)

    def set_configuration(self, hashed: str, **values: Any) -> None:
        """Change what is known of a configuration: `options`, `policies` or `reason`."""
        columns = ", ".join(f"{name} = ?" for name in values)
        given = [value if isinstance(value, str) or value is None else json.dumps(value) for value in values.values()]
        self._connection.execute(f"UPDATE configurations SET {columns} WHERE hash = ?", (*given, hashed))

    def add_scene(self, source: str, number: int, name: str, hashed: str, queries: int) -> None:
        """Store that a scene was run."""
        row = (source, number, name, hashed, queries)
        self._connection.execute("INSERT OR REPLACE INTO scenes VALUES (?, ?, ?, ?, ?)", row)

    def add_records(self, rows: Iterable[Sequence[Any]]) -> None:
        """Store records, as `row_of` gives them; those that are there are replaced."""
        self._connection.executemany(f"INSERT OR REPLACE INTO records VALUES ({', '.join('?' * 29)})", rows)


def row_of(configuration: str, record: Record, scene: Scene, hashed: str, environment: str) -> tuple[Any, ...]:
    """A record as a row of the table.

    Args:
        configuration: its hash.
        record: the record.
        scene: that it is of.
        hashed: digest of the scene.
        environment: hash of the environment.
    """
    flops = dict(record.cost.flops)
    return (
        configuration,
        record.scene,
        record.query,
        record.sample,
        scene.id,
        hashed,
        scene.queries[record.query].text,
        record.kind,
        record.size,
        *scene.image.shape[:2],
        *record.overlap,
        record.predicted,
        record.iou,
        *record.agreement,
        record.coverage,
        record.cost.image_tokens,
        record.cost.equivalent_tokens,
        json.dumps(record.layers),
        sum(flops.values()),
        json.dumps(flops),
        record.cost.kv_bytes,
        json.dumps({step: round(value, 3) for step, value in record.milliseconds.items()}),
        json.dumps(dict(record.metrics)),
        None if record.mask is None else packed_mask(record.mask),
        packed_json(record.stages) if record.stages or record.mask is not None else None,
        environment,
    )


@contextmanager
def reading(folder: str | Path) -> Iterator[Store]:
    """A store to read from, also while a sweep writes to it.

    Raises:
        InputError: there is none, it is damaged, or of another version.
    """
    home = path_given("folder of a sweep", folder)
    path = home / FILE
    empty = InputError(f"{str(folder)!r} holds no results of a sweep ({FILE}); check the path")
    if not path.is_file():
        raise empty
    with told(home), closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
        if _is_empty(connection):
            raise empty
        _check(connection, home)
        yield Store(home, connection)


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
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = FULL")
                if _is_empty(connection):
                    connection.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version = {VERSION}; COMMIT;")
                _check(connection, home)
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


def _check(connection: sqlite3.Connection, home: Path) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version != VERSION:
        raise InputError(
            f"{str(home / FILE)!r} is of version {version}, expected {VERSION}; read it with the release of tokenprune "
            "that made it, or start a new folder"
        )
    (state,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if state != "ok":
        raise sqlite3.DatabaseError(state)


@contextmanager
def told(home: Path) -> Iterator[None]:
    """Errors of the database and of the disk as one line that says what to do."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if "full" in str(error):
            why = "the disk is full; make room, and give the same command: it goes on from what is stored"
        elif "locked" in str(error):
            why = "another process holds it; close that, and give the same command"
        elif "disk I/O" in str(error):
            why = "the disk failed or a quota is used up; see to it, and give the same command: it goes on"
        else:
            why = f"it cannot be used ({error}); check that the folder can be written"
        raise InputError(f"{str(home / FILE)!r}: {why}") from error
    except sqlite3.DatabaseError as error:
        cure = f"keep a copy and try `sqlite3 {FILE} .recover`, or start a new folder"
        raise InputError(f"{str(home / FILE)!r} is damaged ({' '.join(str(error).split())}); {cure}") from error
    except OSError as error:
        raise InputError(f"{str(home)!r} cannot be written ({reason(error)}); choose another folder") from error
