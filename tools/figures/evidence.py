"""Tables over models, from `docs/results/evidence/MODEL.json`, each written by `stored_sweep.py evidence/MODEL RUN`:
accuracies side by side, which orders of methods hold in every model, and what renumbering costs in each."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

from scipy.stats import kendalltau
from sweep_tables import HEADLINE_BUDGET, lost, table, verdict

EVIDENCE = Path(__file__).resolve().parents[2] / "docs" / "results" / "evidence"
ORDER = ("lisa-tiny", "lisa-tiny-seed1", "lisa-tiny-seed2", "lisa-tiny-untaught", "photo-small")
"""Models as they are shown; those without a file are left out."""


@cache
def models() -> dict[str, dict[str, Any]]:
    """The stored sweeps by model."""
    files = {name: EVIDENCE / f"{name}.json" for name in ORDER}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.is_file()}


def methods(model: str, policy: str = "keep", budget: float = HEADLINE_BUDGET) -> dict[str, dict[str, Any]]:
    """A model's rows by strategy, of one position policy and budget; the rows of no pruning have neither."""
    return {
        row["strategy"]: row
        for row in models()[model]["rows"]
        if set(row["given"]) <= {"positions"}
        and (row["budget"] is None or (row["budget"] == budget and row["positions"] == policy))
    }


def names() -> list[str]:
    """All strategies, those without a budget first, then by their mean place in the models in which they ran."""
    places: dict[str, list[float]] = {}
    for model in models():
        rows = methods(model)
        ranked = sorted(rows, key=lambda name: (rows[name]["budget"] is not None, -rows[name]["giou"][0]))
        for place, name in enumerate(ranked):
            places.setdefault(name, []).append(place / len(ranked))
    return sorted(places, key=lambda name: sum(places[name]) / len(places[name]))


def everywhere() -> str:
    """gIoU with its interval at the headline budget, positions kept, of every method in every model; bold: the best."""
    rows = {model: methods(model) for model in models()}
    best = {
        model: max((name for name, row in own.items() if row["budget"] is not None), key=lambda n: own[n]["giou"][0])
        for model, own in rows.items()
    }
    lines = []
    for name in names():
        cells = ["–" if name not in own else _cell(own[name], name == best[model]) for model, own in rows.items()]
        lines.append((f"`{name}`", *cells))
    return table(("strategy", *(f"`{model}`" for model in rows)), lines)


def _cell(row: dict[str, Any], best: bool) -> str:
    value, low, high = row["giou"]
    return f"{f'**{value:.3f}**' if best else f'{value:.3f}'} [{low:.3f}, {high:.3f}]"


Signs = dict[tuple[str, str], list[int]]


def signs(budget: float = HEADLINE_BUDGET) -> Signs:
    """For every two methods that ran in all models: in each model 1 or -1 if the first is shown to be better or worse,
    else 0."""
    found: Signs = {}
    for stored in models().values():
        for at, one, other, gap, shown in stored["orders"]:
            if at == budget:
                first, second = sorted((one, other))
                sign = (1 if gap > 0 else -1) if shown else 0
                found.setdefault((first, second), []).append(sign if first == one else -sign)
    return {pair: values for pair, values in found.items() if len(values) == len(models())}


def orders() -> str:
    """For every method: those that it is shown to beat, and to be beaten by, in every model."""
    found = signs()
    lines = []
    for name in names():
        above, below = [], []
        for (one, other), values in found.items():
            if name in (one, other):
                mate, turn = (other, 1) if name == one else (one, -1)
                if all(value == turn for value in values):
                    above.append(mate)
                if all(value == -turn for value in values):
                    below.append(mate)
        if any(name in pair for pair in found):
            lines.append((f"`{name}`", _listed(above), _listed(below)))
    return table(("strategy", "better than, in every model", "worse than, in every model"), lines)


def _listed(found: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names() if name in found)


def counts() -> str:
    """How many pairs of methods have the same order in every model, at every budget."""
    budgets = sorted({one[0] for stored in models().values() for one in stored["orders"]}, reverse=True)
    lines = []
    for budget in budgets:
        values = list(signs(budget).values())
        same = sum(len(set(own)) == 1 and own[0] != 0 for own in values)
        opposed = sum({1, -1} <= set(own) for own in values)
        lines.append((f"{budget:g}", *map(str, (len(values), same, opposed, len(values) - same - opposed))))
    return table(("budget", "pairs", "shown in every model, the same", "shown in two, opposite", "neither"), lines)


def opposed() -> str:
    """Pairs of methods whose order at the headline budget is shown in one model and the opposite in another."""
    lines = []
    for (one, other), values in signs().items():
        if {1, -1} <= set(values):
            words = {1: f"`{one}`", -1: f"`{other}`", 0: "none shown"}
            lines.append((f"`{one}`, `{other}`", *(words[value] for value in values)))
    return table(("pair", *(f"better in `{model}`" for model in models())), lines)


def likeness() -> str:
    """Kendall's tau of the methods' order at the headline budget between every two models."""
    lines = []
    for one, other in combinations(models(), 2):
        first, second = methods(one), methods(other)
        both = [name for name in first if name in second and first[name]["budget"] is not None]
        tau = kendalltau([first[name]["giou"][0] for name in both], [second[name]["giou"][0] for name in both])
        lines.append((f"`{one}`, `{other}`", str(len(both)), f"{tau.statistic:.2f}", f"{tau.pvalue:.2g}"))
    return table(("models", "methods", "Kendall's tau", "p"), lines)


def renumbered() -> str:
    """What renumbering changes at the headline budget, in every model; in brackets where no difference is shown."""
    rows = {model: methods(model, "renumber") for model in models()}
    changes = {
        model: [row["against_other_policy"]["value"][0] for row in own.values() if row.get("against_other_policy")]
        for model, own in rows.items()
    }
    lines = [("median", *(f"**{median(own):+.3f}**" for own in changes.values()))]
    for name in names():
        cells = [lost(own[name]).strip() if name in own else "" for own in rows.values()]
        if any(cells):
            lines.append((f"`{name}`", *cells))
    return table(("strategy", *(f"`{model}`" for model in rows)), lines)


def claimed() -> str:
    """Paired differences of CSP from the methods that its paper compares with, in every model."""
    pairs = {
        model: {(pair["first"], pair["second"]): pair["difference"] for pair in stored["pairs"] if _at_headline(pair)}
        for model, stored in models().items()
    }
    asked = list(dict.fromkeys(pair for own in pairs.values() for pair in own))
    lines = [
        (f"`{one}` against `{other}`", *(verdict(own.get((one, other))) for own in pairs.values()))
        for one, other in asked
    ]
    return table(("", *(f"`{model}`" for model in pairs)), lines)


def _at_headline(pair: dict[str, Any]) -> bool:
    return bool(pair["budget"] == HEADLINE_BUDGET)


TABLES: tuple[Callable[[], str], ...] = (everywhere, orders, counts, opposed, likeness, renumbered, claimed)
