"""The records and answers of a store, ordered as reports show them: groups, methods, budgets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenprune.errors import InputError
from tokenprune.report.page.curves import SERIES
from tokenprune.sweeps.answer_summary import AnswerLine, method_of, summarised_answers
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
class AnswerGroup:
    """Answers that can be compared: all methods on one dataset with one model.

    Attributes:
        model, dataset, split, protocol: as in the store.
        lines: one or more.
        order: of methods, which gives each its colour; further ones than those of the lines hold a place.
    """

    model: str
    dataset: str
    split: str
    protocol: str
    lines: list[AnswerLine]
    order: list[str]

    @property
    def title(self) -> str:
        """In headings and selectors."""
        return f"{self.model} on {self.dataset} ({', '.join(filter(None, (self.split, self.protocol)))})"

    @property
    def methods(self) -> dict[str, list[AnswerLine]]:
        """Lines by strategy and options, smallest number of tokens first."""
        lines = sorted(self.lines, key=lambda line: line.tokens_ratio)
        found = {method: [line for line in lines if line.method == method] for method in self.order}
        return {method: some for method, some in found.items() if some}

    @property
    def metrics(self) -> dict[str, bool]:
        """Whether higher is better, by metric."""
        found: dict[str, bool] = {}
        for line in self.lines:
            for name, score in line.scores.items():
                found.setdefault(name, score.higher_is_better)
        return found

    @property
    def answers(self) -> int:
        """How many every line has; the number of all samples where they differ."""
        return len(frozenset[str]().union(*(line.samples for line in self.lines)))


@dataclass(frozen=True, eq=False)
class Study:
    """A sweep as read from its store.

    Attributes:
        folder: of the store.
        groups: of records with masks, in the order of the sweep's configuration; there may be none.
        config: of the sweep, as plain data.
        environments: that its records and answers were made in: (when first, what).
        recorded: those of them that records were made in.
        reasons: why configurations could not run, by what is shown of them.
        answers: groups of answers; there may be none.
    """

    folder: Path
    groups: list[Group]
    config: Mapping[str, Any]
    environments: list[tuple[str, Mapping[str, Any]]]
    reasons: Mapping[str, str]
    answers: list[AnswerGroup] = field(default_factory=list)
    recorded: list[Mapping[str, Any]] = field(default_factory=list)

    @property
    def config_hash(self) -> str:
        """A short hash of the configuration."""
        return digest(self.config)


def read_study(run: str | Path) -> Study:
    """The records and answers of a store, with the statistics of each method; also while a sweep runs.

    Raises:
        InputError: there is no such store, it has no record and no answer, it cannot be read, or pandas is not
            installed.
    """
    table, lines = read_results(run), summarised_answers(run)
    if table.empty and not lines:
        raise InputError(f"{str(run)!r} holds no records yet; run the sweep, then make its report")
    with reading(run) as store, decoding(store.folder):
        meta = store.meta()
        recording = {*table.environment}
        used = recording | {hashed for (hashed,) in store.rows("SELECT DISTINCT environment FROM answers")}
        made = [
            (hashed, when, json.loads(value))
            for hashed, when, value in store.rows("SELECT hash, made, value FROM environments ORDER BY made")
            if hashed in used
        ]
        reasons = reasons_of(store, meta.get("planned", ()))
    groups = [
        _group(dict(zip(TOGETHER, map(str, where), strict=True)), part)
        for where, part in table.groupby(TOGETHER, sort=False, dropna=False)
    ]
    environments = [(when, what) for _, when, what in made]
    recorded = [what for hashed, _, what in made if hashed in recording]
    answers = _answer_groups(lines, groups)
    return Study(Path(run), groups, meta.get("config", {}), environments, reasons, answers, recorded)


def _answer_groups(lines: Sequence[AnswerLine], groups: Sequence[Group]) -> list[AnswerGroup]:
    """Groups of answers; a method has the colour that it has among the records, if there are enough colours."""
    common = dict.fromkeys([method for group in groups for method in group.methods] + [line.method for line in lines])
    found: dict[tuple[str, str, str, str], list[AnswerLine]] = {}
    for line in lines:
        found.setdefault(line.where, []).append(line)
    made = []
    for where, some in found.items():
        own, order = dict.fromkeys(line.method for line in some), list(common)
        made.append(AnswerGroup(*where, some, order if own.keys() <= {*order[:SERIES]} else list(own)))
    return made


def _group(where: dict[str, str], records: pd.DataFrame) -> Group:
    parts = dict(iter(records.groupby("label", sort=False)))
    given = {label: str(part.given.iloc[0]) for label, part in parts.items()}
    rows = [Row(method_of(line.strategy, given[line.label]), line, parts[line.label]) for line in summarised(records)]
    return Group(**where, rows=rows, records=records)
