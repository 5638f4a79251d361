"""The tables of a store, and what is read from them and added to them."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tokenprune.datasets.base import Scene
from tokenprune.evaluation.records import Record, packed_json, packed_mask
from tokenprune.sweeps.plan import Configuration
from tokenprune.sweeps.store.problems import decoding, told

# keys of meta begin so
LISTING = "listing of "  # what a dataset lists, by the digest of its entry
DIGESTS = "digests of "  # code and weights, by the name of a model
VERSION = 3
SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE environments (hash TEXT PRIMARY KEY, made TEXT NOT NULL, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE configurations (
    hash TEXT PRIMARY KEY, model TEXT NOT NULL, dataset TEXT NOT NULL, split TEXT NOT NULL, protocol TEXT NOT NULL,
    strategy TEXT NOT NULL, label TEXT NOT NULL, given TEXT NOT NULL, budget REAL, seed INTEGER NOT NULL,
    options TEXT, policies TEXT, reason TEXT, source TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE scenes (
    source TEXT NOT NULL, scene INTEGER NOT NULL, name TEXT NOT NULL, digest TEXT NOT NULL, queries INTEGER NOT NULL,
    queries_before INTEGER NOT NULL, state TEXT NOT NULL,
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


@dataclass(frozen=True)
class StoredScene:
    """A scene that was run.

    Attributes:
        name: of it.
        digest: of its image, and of the queries that it had.
        queries: how many.
        before: queries of the scenes before it; with a limit, what decides which queries are asked.
        state: of its files, see `data_check.state_of`; empty if it has none.
    """

    name: str
    digest: str
    queries: int
    before: int
    state: str


class Store:
    """An open store. Make one with `reading` or `writing`."""

    def __init__(self, folder: Path, connection: sqlite3.Connection) -> None:
        self.folder, self._connection = folder, connection

    # what is there ----------------------------------------------------------------------------------------------------

    def meta(self) -> dict[str, Any]:
        """Plain data by key, such as "config" and "planned"."""
        with decoding(self.folder):
            return {key: json.loads(value) for key, value in self.rows("SELECT key, value FROM meta")}

    def done(self, configuration: str) -> dict[int, tuple[int, int]]:
        """By scene, how many queries it had when a configuration ran on it, and how many of them are stored."""
        cut = "MAX(LENGTH(scene_digest) - LENGTH(REPLACE(scene_digest, ':', '')))"
        found = f"SELECT scene, {cut}, COUNT(*) FROM records WHERE configuration = ? GROUP BY scene"
        return {scene: (queries, count) for scene, queries, count in self.rows(found, (configuration,))}

    def stored_scenes(self, source: str) -> dict[int, StoredScene]:
        """The scenes of a source that were run, by number."""
        found = "SELECT scene, name, digest, queries, queries_before, state FROM scenes WHERE source = ? ORDER BY scene"
        return {number: StoredScene(*rest) for number, *rest in self.rows(found, (source,))}

    def scenes(self, source: str) -> dict[int, str]:
        """The digests of the scenes of a source that were run, by number."""
        return dict(self.rows("SELECT scene, digest FROM scenes WHERE source = ?", (source,)))

    def count(self, table: str = "records") -> int:
        """Rows of a table in all."""
        ((found,),) = self.rows(f"SELECT COUNT(*) FROM {table}")
        return int(found)

    def rows(self, query: str, values: Sequence[Any] = ()) -> Iterator[tuple[Any, ...]]:
        """The rows that a SELECT gives, read as they are asked for."""
        with told(self.folder):
            for row in self._connection.execute(query, values):  # noqa: UP028 - a cursor must not be closed after it
                yield row

    def named_rows(self, query: str, values: Sequence[Any] = ()) -> tuple[list[str], list[tuple[Any, ...]]]:
        """The columns and the rows that a SELECT gives."""
        with told(self.folder):
            found = self._connection.execute(query, values)
            return [column[0] for column in found.description], found.fetchall()

    # what is added ----------------------------------------------------------------------------------------------------

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing of what is added inside; on disk at its end."""
        with told(self.folder), self._connection:  # which commits, or takes everything back
            self._connection.execute("BEGIN IMMEDIATE")
            yield

    def change(self, statement: str, values: Sequence[Any]) -> None:
        """Change rows, inside a transaction."""
        self._connection.execute(statement, values)

    def insert(self, table: str, row: Mapping[str, Any]) -> None:
        """Add a row, by column, unless one with its key is there; inside a transaction."""
        places = ", ".join("?" * len(row))
        self.change(f"INSERT OR IGNORE INTO {table} ({', '.join(row)}) VALUES ({places})", [*row.values()])

    def set_meta(self, **values: Any) -> None:
        """Store plain data by key."""
        rows = [(key, json.dumps(value)) for key, value in values.items()]
        self._connection.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", rows)

    def add_environment(self, hashed: str, value: Mapping[str, Any]) -> None:
        """Store where and with what records are made."""
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        row = (hashed, now, json.dumps(value, sort_keys=True))
        self._connection.execute("INSERT OR IGNORE INTO environments VALUES (?, ?, ?)", row)

    def add_configuration(self, one: Configuration, source: str) -> None:
        """Store a configuration, unless it is there; what could not run before may be tried again."""
        strategy, given = one.contender.strategy, json.dumps(one.contender.given, sort_keys=True, default=repr)
        row = (one.hash, one.model, one.dataset, one.split, one.protocol, strategy.name, one.contender.label, given)
        places = ", ".join("?" * 14)
        self._connection.execute(
            f"INSERT OR IGNORE INTO configurations VALUES ({places})",
            (*row, one.contender.budget, one.seed, None, None, None, source),
        )
        self.set_configuration(one.hash, reason=None)

    def set_configuration(self, hashed: str, **values: Any) -> None:
        """Change what is known of a configuration: `options`, `policies` or `reason`."""
        columns = ", ".join(f"{name} = ?" for name in values)
        given = [value if isinstance(value, str) or value is None else json.dumps(value) for value in values.values()]
        self._connection.execute(f"UPDATE configurations SET {columns} WHERE hash = ?", (*given, hashed))

    def add_scene(
        self, source: str, number: int, name: str, hashed: str, queries: int, before: int, state: str
    ) -> None:
        """Store a scene; see `StoredScene`."""
        row = (source, number, name, hashed, queries, before, state)
        self._connection.execute("INSERT OR REPLACE INTO scenes VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    def forget(self, configuration: str, scene: int) -> None:
        """Remove the records of a configuration on a scene, which is run anew."""
        where = "configuration = ? AND scene = ?"
        self._connection.execute(f"DELETE FROM records WHERE {where}", (configuration, scene))

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
