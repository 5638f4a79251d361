"""The records of a sweep, ordered as reports show them: groups, methods, budgets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenprune.errors import InputError
from tokenprune.sweeps.plan import digest
from tokenprune.sweeps.results import read_results, reasons_of
from tokenprune.sweeps.store import decoding, reading
from tokenprune.sweeps.summary import REFERENCE, TOGETHER, Line, summarised

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Row:
    """One method at one budget.

    Attributes:
        method: the strategy with the options that were given, without the budget.
        line: its numbers.
        records: its rows of the table of `read_results`.
    """

    method: str
    line: Line
    records: pd.DataFrame = field(repr=False)

    @property
    def label(self) -> str:
        """Strategy, options and budget."""
        return self.line.label


@dataclass(frozen=True, eq=False)
class Group:
    """What can be compared: all methods on one dataset with one model.

    Attributes:
        model, dataset, split, protocol: as in the results.
        rows: in the order of the sweep's configuration.
        records: of all rows.
    """

    model: str
    dataset: str
    split: str
    protocol: str
    rows: list[Row]
    records: pd.DataFrame = field(repr=False)

    @property
    def title(self) -> str:
        """In headings and selectors."""
        return f"{self.model} on {self.dataset} ({self.split}, {self.protocol})"

    @property
    def methods(self) -> list[str]:
        """Once each, in order."""
        return list(dict.fromkeys(row.method for row in self.rows))

    @property
    def budgets(self) -> list[float]:
        """All of them, largest first."""
        return sorted({row.line.budget for row in self.rows if row.line.budget is not None}, reverse=True)

    @property
    def reference(self) -> Row | None:
        """The untouched model, if it was run."""
        return next((row for row in self.rows if row.label == REFERENCE), None)

    @property
    def queries(self) -> int:
        """How many queries every row has; the largest number where they differ."""
        return max(row.line.queries for row in self.rows)

    def at(self, budget: float | None) -> list[Row]:
        """The rows of a budget, after those that take none; None = only these."""
        return [row for row in self.rows if row.line.budget is None] + [
            row for row in self.rows if row.line.budget is not None and row.line.budget == budget
        ]

    def of(self, method: str) -> list[Row]:
        """The rows of a method, smallest number of tokens first."""
        return sorted((row for row in self.rows if row.method == method), key=lambda row: row.line.tokens_ratio)


@dataclass(frozen=True, eq=False)
class Study:
    """A sweep as read from its store.

    Attributes:
        folder: of the store.
        groups: in the order of the sweep's configuration.
        config: of the sweep, as plain data.
        environments: that its records were made in: (when first, what).
        reasons: why configurations could not run, by what is shown of them.
    """

    folder: Path
    groups: list[Group]
    config: Mapping[str, Any]
    environments: list[tuple[str, Mapping[str, Any]]]
    reasons: Mapping[str, str]

    @property
    def config_hash(self) -> str:
        """A short hash of the configuration."""
        return digest(self.config)


def read_study(run: str | Path) -> Study:
    """The records of a sweep, with the statistics of each method; also while it runs.

    Raises:
        InputError: there is no such store, it has no record, it cannot be read, or pandas is not installed.
    """
    table = read_results(run)
    if table.empty:
        raise InputError(f"{str(run)!r} holds no records yet; run the sweep, then make its report")
    with reading(run) as store, decoding(store.folder):
        meta = store.meta()
        used = set(table.environment)
        made = [
            (when, json.loads(value))
            for hashed, when, value in store.rows("SELECT hash, made, value FROM environments ORDER BY made")
            if hashed in used
        ]
        reasons = reasons_of(store, meta.get("planned", ()))
    groups = [
        _group(dict(zip(TOGETHER, map(str, where), strict=True)), part)
        for where, part in table.groupby(TOGETHER, sort=False, dropna=False)
    ]
    return Study(Path(run), groups, meta.get("config", {}), made, reasons)


def _group(where: dict[str, str], records: pd.DataFrame) -> Group:
    parts = dict(iter(records.groupby("label", sort=False)))
    rows = [Row(_method(parts[line.label]), line, parts[line.label]) for line in summarised(records)]
    return Group(**where, rows=rows, records=records)


def _method(part: pd.DataFrame) -> str:
    given = json.loads(part.given.iloc[0])
    options = ", ".join(f"{key}={value}" for key, value in given.items())
    return f"{part.strategy.iloc[0]} ({options})" if options else str(part.strategy.iloc[0])
