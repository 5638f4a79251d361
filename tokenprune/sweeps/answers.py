"""Answers in a store: what an evaluator of question answering gave, beside the records of masks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenprune.errors import InputError, OptionError
from tokenprune.sweeps.answer_sets import MOST, Answer, AnswerSet, Score, checked_set
from tokenprune.sweeps.plan import digest
from tokenprune.sweeps.results import table_of
from tokenprune.sweeps.run import refuse_tuning
from tokenprune.sweeps.store import FILE, Store, decoding, reading, writing
from tokenprune.sweeps.store.answer_tables import COLUMNS, COMPARED, difference, other_direction
from tokenprune.utils.arguments import listed

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Answer", "AnswerSet", "Score", "checked_set", "read_answers", "store_answers", "stored_scores"]

READ = """
    c.model, c.dataset, c.split, c.protocol, c.strategy, c.label, c.given, c.budget, c.seed, a.sample, a.text, a.answer,
    a.target, a.ran, a.image_tokens, a.other_tokens, a.equivalent_tokens, a.layers, a.flops, a.flops_by_part,
    a.flops_unpruned, a.kv_bytes, a.milliseconds, a.metrics, a.run, a.environment, a.configuration
"""
ORDER = """
    c.model, c.dataset, c.split, c.protocol, c.strategy != 'none', c.strategy, c.label, c.seed,
    LENGTH(a.sample), a.sample
"""


def store_answers(
    run: str | Path, answers: AnswerSet | Mapping[str, Any] | Iterable[AnswerSet | Mapping[str, Any]]
) -> int:
    """Store answers in a new or an existing folder, beside the records of a sweep; all of them or none.

    Answers that are stored already are left as they are, so the same call may be repeated, and a set may grow.

    Args:
        run: folder of a sweep, or a new one.
        answers: one or more sets, or mappings that `AnswerSet` can be made of.

    Returns the number of answers that were not stored before.

    Raises:
        OptionError: a set lacks a field, or has an unknown one or a value of another type; a number is not finite, a
            text is not Unicode, or a sample occurs twice.
        InputError: the store has another answer to a sample, or another score; another process writes to the folder, or
            it cannot be written.

    Example:
        >>> import tempfile, tokenprune as tp
        >>> from tokenprune.sweeps.answers import store_answers
        >>> answer = {"sample": "0", "answer": "yes", "image_tokens": 64, "equivalent_tokens": 22.0}
        >>> known = {"model": "my-model", "dataset": "my-questions", "strategy": "fastv", "label": "fastv at 0.35"}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     added = [store_answers(folder, {**known, "answers": [answer]}) for _ in range(2)]
        ...     table = tp.read_answers(folder)
        >>> added, table.answer.tolist()
        ([1, 0], ['yes'])
    """
    given = [answers] if isinstance(answers, (AnswerSet, Mapping)) else listed(answers)
    if not given:
        raise OptionError("no answers found, expected at least one set of them")
    names = [f"set {number} of answers" for number in range(len(given))] if len(given) > 1 else ["set of answers"]
    sets = [checked_set(one, name) for one, name in zip(given, names, strict=True)]
    with writing(run) as store:
        refuse_tuning(store, run)
        with store.transaction():
            return sum(_add(store, one) for one in sets)


def read_answers(run: str | Path) -> pd.DataFrame:
    """The answers in a store, a row for each configuration and sample; none gives a table without rows.

    The columns are those of `AnswerSet` and `Answer`. Those that are also in `tokenprune.read_results` have the same
    names and types, among them `model, dataset, split, strategy, label, budget, sample, equivalent_tokens, flops`.
    `given` is a JSON text; `layers`, `flops_by_part`, `milliseconds` and `metrics` are lists and mappings. The
    untouched model comes first, then strategies by name.

    Args:
        run: folder of the store.

    Raises:
        InputError: there is no such store, it cannot be read, or pandas is not installed.

    Example:
        >>> import tempfile, tokenprune as tp
        >>> config = {"models": "lisa-tiny", "datasets": "shapes", "strategies": "none", "limit": 1}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = tp.sweep(config, folder)
        ...     len(tp.read_answers(folder))
        0
    """
    query = f"SELECT {READ} FROM answers a JOIN configurations c ON c.hash = a.configuration ORDER BY {ORDER}"
    with reading(run) as store:
        table = table_of(store, query)
        with decoding(store.folder):
            _check_values(table, store.count("answers"))
            for column in ("budget", "flops", "flops_unpruned", "kv_bytes"):
                table[column] = table[column].astype("float64")
    return table


def _check_values(table: pd.DataFrame, count: int) -> None:
    """Raise ValueError if there are rows without a configuration, or values of another kind than were stored."""
    if len(table) != count:
        raise ValueError(f"{count - len(table)} answers without a configuration")
    kinds = {**dict.fromkeys(("metrics", "flops_by_part", "milliseconds"), dict), "layers": list}
    for column, kind in kinds.items():
        if not all(isinstance(value, kind) for value in table[column]):
            raise ValueError(f"{column} of another kind")
    if not all(isinstance(json.loads(text), dict) for text in table.given.unique()):
        raise ValueError("given of another kind")
    for column in ("image_tokens", "equivalent_tokens"):
        if not all(isinstance(value, (int, float)) and 0 <= value <= MOST for value in table[column]):
            raise ValueError(f"{column} of another kind")


def stored_scores(run: str | Path) -> dict[str, list[tuple[int, str, Score]]]:
    """The evaluator's scores by configuration: how many answers each is of, the metric and the score.

    Raises:
        InputError: there is no such store, or it cannot be read.
    """
    query = "SELECT configuration, answers, metric, value, stderr, higher_is_better FROM scores ORDER BY run DESC"
    found: dict[str, list[tuple[int, str, Score]]] = {}
    with reading(run) as store, decoding(store.folder):
        for hashed, count, metric, value, stderr, higher in store.rows(query):
            score = Score(value=value, stderr=stderr, higher_is_better=bool(higher))
            found.setdefault(hashed, []).append((count, metric, score))
    return found


def _add(store: Store, one: AnswerSet) -> int:
    """Add what is not stored of a set; returns the number of answers."""
    hashed, environment = one.configuration, digest(one.environment)
    rows = {answer.sample: _row(answer) for answer in one.answers}
    count = len(one.answers)
    scores = {
        (one.run, count, metric): (score.value, score.stderr, int(score.higher_is_better))
        for metric, score in one.scores.items()
    }
    if found := difference(store, hashed, {sample: row[0] for sample, row in rows.items()}, scores) or other_direction(
        store, one.known, {metric: score.higher_is_better for metric, score in one.scores.items()}
    ):
        raise InputError(
            f"{one.about}: {found} is another in {str(store.folder / FILE)!r}; store runs with other settings in a "
            "folder of their own, or under another name of the model"
        )
    before = store.count("answers")
    store.add_environment(environment, one.environment)
    store.insert("configurations", {"hash": hashed, **one.known, "source": ""})
    for sample, (compared, milliseconds) in rows.items():
        values = (hashed, sample, *compared, milliseconds, one.run, environment)
        store.insert("answers", dict(zip(COLUMNS, values, strict=True)))
    for (run, _, metric), (value, stderr, higher) in scores.items():
        row = {"configuration": hashed, "run": run, "answers": count, "metric": metric, "value": value}
        store.insert("scores", {**row, "stderr": stderr, "higher_is_better": higher})
    return store.count("answers") - before


def _row(answer: Answer) -> tuple[tuple[Any, ...], str]:
    """The values of `COMPARED`, and milliseconds, as they are stored."""
    plain = answer.model_dump()
    for name in ("layers", "flops_by_part", "metrics", "milliseconds"):
        plain[name] = json.dumps(plain[name], sort_keys=True)
    return tuple(plain[name] for name in COMPARED), plain["milliseconds"]
