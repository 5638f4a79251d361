"""The tables of answers: what a model said under a strategy, and how an evaluator scored it.

They came with version 3 of the store. A store of version 2 is read as one without answers, and gets the tables when it
is written.
"""

from __future__ import annotations

from collections.abc import Mapping

from tokenprune.sweeps.store.tables import Store

ANSWER_TABLES = """
CREATE TABLE answers (
    configuration TEXT NOT NULL REFERENCES configurations (hash), sample TEXT NOT NULL,
    text TEXT, answer TEXT, target TEXT, ran TEXT,
    image_tokens INTEGER NOT NULL, other_tokens INTEGER, equivalent_tokens REAL NOT NULL, layers TEXT NOT NULL,
    flops REAL, flops_by_part TEXT NOT NULL, flops_unpruned REAL, kv_bytes REAL, metrics TEXT NOT NULL,
    milliseconds TEXT NOT NULL, run TEXT NOT NULL, environment TEXT NOT NULL REFERENCES environments (hash),
    PRIMARY KEY (configuration, sample)
) WITHOUT ROWID;
CREATE TABLE scores (
    configuration TEXT NOT NULL REFERENCES configurations (hash), run TEXT NOT NULL, answers INTEGER NOT NULL,
    metric TEXT NOT NULL, value REAL NOT NULL, stderr REAL, higher_is_better INTEGER NOT NULL,
    PRIMARY KEY (configuration, run, answers, metric)
) WITHOUT ROWID;
"""
# What an answer is: equal wherever and however often it was stored.
COMPARED = (
    *("text", "answer", "target", "ran", "image_tokens", "other_tokens", "equivalent_tokens", "layers"),
    *("flops", "flops_by_part", "flops_unpruned", "kv_bytes", "metrics"),
)
COLUMNS = ("configuration", "sample", *COMPARED, "milliseconds", "run", "environment")


def answers_of(store: Store, configuration: str) -> dict[str, tuple[object, ...]]:
    """The values of `COMPARED` of a configuration's answers, by sample."""
    query = f"SELECT sample, {', '.join(COMPARED)} FROM answers WHERE configuration = ?"
    return {sample: tuple(values) for sample, *values in store.rows(query, (configuration,))}


def scores_of(store: Store, configuration: str) -> dict[tuple[str, int, str], tuple[object, ...]]:
    """Value, standard error and direction of a configuration's scores, by run, number of answers, and metric."""
    query = "SELECT run, answers, metric, value, stderr, higher_is_better FROM scores WHERE configuration = ?"
    return {(run, count, metric): tuple(values) for run, count, metric, *values in store.rows(query, (configuration,))}


def first_difference(store: Store, other: Store) -> tuple[str, str] | None:
    """The configuration, and what of it two stores tell differently ("sample '3'"); None if nothing is."""
    both = {hashed for (hashed,) in store.rows("SELECT DISTINCT configuration FROM answers")}
    for (hashed,) in other.rows("SELECT DISTINCT configuration FROM answers"):
        if hashed in both and (found := difference(store, hashed, answers_of(other, hashed), scores_of(other, hashed))):
            return hashed, found
    return None


def difference(
    store: Store,
    configuration: str,
    answers: Mapping[str, tuple[object, ...]],
    scores: Mapping[tuple[str, int, str], tuple[object, ...]],
) -> str:
    """What a store tells otherwise of a configuration, such as "sample '3'"; empty if nothing is."""
    stored = answers_of(store, configuration)
    for sample, values in answers.items():
        if stored.get(sample, values) != values:
            return f"sample {sample!r}"
    known = scores_of(store, configuration)
    same = stored.keys() == answers.keys()  # so scores of as many answers are of the same, whatever run they are from
    for (run, count, metric), values in scores.items():
        for other, found in known.items():
            if other[1:] == (count, metric) and (same or other[0] == run) and found != values:
                return f"score {metric!r}"
    return ""


def other_direction(store: Store, known: Mapping[str, object], higher: Mapping[str, bool]) -> str:
    """A metric that other strategies' scores on the same dataset tell to be better the other way; empty if none is.

    Args:
        store: open.
        known: what is stored of a configuration.
        higher: by metric, whether higher is better.
    """
    query = """
        SELECT DISTINCT s.metric, s.higher_is_better FROM scores s JOIN configurations c ON c.hash = s.configuration
        WHERE c.model = ? AND c.dataset = ? AND c.split = ? AND c.protocol = ?
    """
    where = [known[name] for name in ("model", "dataset", "split", "protocol")]
    for metric, stored in store.rows(query, where):
        if higher.get(metric, bool(stored)) != bool(stored):
            return f"the direction of score {metric!r}"
    return ""
