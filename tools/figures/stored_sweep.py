"""Write `docs/results/NAME.json`, from which `results.py` makes its tables, from the stores of sweeps.

    python tools/figures/stored_sweep.py NAME RUN [RUN ...]

A row for every strategy and budget: gIoU with its interval over scenes, accuracies by kind of query and size of target,
and paired differences: from no pruning, from the plain grid at the same budget, from the other position policy, and
from the best of that budget and policy. `orders` has the paired difference of every two methods, positions kept, which
`evidence.py` compares between models.
"""

from __future__ import annotations

import json
import sqlite3
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd

import tokenprune as tp
from tokenprune.evaluation.statistics import Difference, Estimate, mean_interval
from tokenprune.sweeps.summary import differences, scenes_of

STORED = Path(__file__).resolve().parents[2] / "docs" / "results"
GRID = "uniform"
PAIRS = (  # as published; then each with the best of its settings in the sweep
    ("csp", "fastv"),
    ("csp", "prumerge+"),
    ("csp+", "fastv (layer=1)"),
    ("csp+", "prumerge+ (positions=keep)"),
    ("csp+", "uniform"),
)


def rows_of(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows, in the order of the configuration."""
    table = table.assign(agreement=agreement(table))
    parts = dict(iter(table.groupby("label", sort=False)))
    policies = {label: policy(part) for label, part in parts.items()}
    untouched = float(parts["none"].flops.mean())
    best: dict[Any, str] = {}
    for label in sorted(parts, key=lambda name: -parts[name].iou.mean()):
        best.setdefault((parts[label].iloc[0].budget, policies[label]), label)
    rows = []
    for label, part in parts.items():
        first = part.iloc[0]
        budget = None if pd.isna(first.budget) else float(first.budget)
        grid = "" if budget is None else f"{GRID} at {budget:g}"
        twin = other_policy(label, part, parts) if policies[label] else None
        default = next((name for name, other in parts.items() if is_default_of(other, first)), None)
        leader = best[first.budget, policies[label]] if policies[label] else None
        rows.append(
            {
                "label": label,
                "strategy": first.strategy,
                "given": json.loads(first.given),
                "options": json.loads(first.options),
                "budget": budget,
                "positions": policies[label],
                "giou": estimate(mean_interval(part.iou.tolist(), scenes_of(part))),
                "ciou": float(part.intersection.sum() / part["union"].sum()),
                "agreement": float(part.agreement.mean()),
                "by_kind": part.groupby("kind", sort=False).iou.mean().to_dict(),
                "by_size": part.groupby("size", sort=False).iou.mean().to_dict(),
                "coverage": float(part.coverage.mean()),
                "equivalent_tokens_ratio": float((part.equivalent_tokens / part.image_tokens).mean()),
                "flops_ratio": float(part.flops.mean()) / untouched,
                "against_none": difference(table, label, "none"),
                "against_grid": difference(table, label, grid) if grid in parts else None,
                "against_other_policy": difference(table, label, twin) if twin else None,
                "against_default": difference(table, label, default) if default else None,
                "against_best": difference(table, label, leader) if leader else None,
            }
        )
    return rows


def pairs_of(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Paired differences of the strategies in `PAIRS` at every budget at which both ran."""
    budgets = sorted(table.budget.dropna().unique(), reverse=True)
    found = []
    for first, second in PAIRS:
        for budget in budgets:
            labels = f"{first} at {budget:g}", f"{second} at {budget:g}"
            if set(labels) <= set(table.label):
                about = {"first": first, "second": second, "budget": float(budget)}
                found.append(about | {"difference": difference(table, *labels)})
    return found


def orders_of(table: pd.DataFrame, rows: list[dict[str, Any]]) -> list[list[Any]]:
    """[budget, first, second, difference, whether it is shown] of every two methods that keep positions and have no
    other option."""
    kept: dict[float, list[dict[str, Any]]] = {}
    for row in rows:
        if row["positions"] == "keep" and set(row["given"]) <= {"positions"}:
            kept.setdefault(row["budget"], []).append(row)
    found = []
    for budget, own in kept.items():
        for one, other in combinations(own, 2):
            gap = differences(table, one["label"], other["label"])
            if gap is not None:
                found.append([budget, one["strategy"], other["strategy"], gap.value, gap.shown])
    return found


def agreement(table: pd.DataFrame) -> pd.Series[float]:
    """IoU with the untouched model's mask; two empty masks agree."""
    union = table.agreement_union
    return (table.agreement_intersection / union.where(union > 0, 1)).where(union > 0, 1.0)


def policy(part: pd.DataFrame) -> str | None:
    """What the strategy does with positions; None where it prunes nothing, and for compositions."""
    first = part.iloc[0]
    if pd.isna(first.budget) or "parts" in json.loads(first.options):
        return None
    return tp.strategy(first.strategy, **json.loads(first.given)).positions


def other_policy(label: str, part: pd.DataFrame, parts: dict[str, pd.DataFrame]) -> str | None:
    """The label of the same strategy, options and budget with the other position policy, if it ran."""
    own = same_but_positions(part)
    return next((name for name, other in parts.items() if name != label and same_but_positions(other) == own), None)


def is_default_of(part: pd.DataFrame, first: pd.Series[Any]) -> bool:
    """Whether a label is another's strategy and budget without options."""
    own = part.iloc[0]
    return bool(own.strategy == first.strategy and own.budget == first.budget and own.given == "{}")


def same_but_positions(part: pd.DataFrame) -> tuple[str, str, float]:
    """What two position policies of one strategy have in common."""
    first = part.iloc[0]
    given = {key: value for key, value in json.loads(first.given).items() if key != "positions"}
    return str(first.strategy), json.dumps(given), float(first.budget)


def environment(run: Path) -> dict[str, str | int]:
    """Versions and machine of the first records."""
    with sqlite3.connect(run / "results.sqlite") as store:
        value = store.execute("SELECT value FROM environments ORDER BY made").fetchone()[0]
    return {key: held for key, held in json.loads(value).items() if isinstance(held, (str, int))}


def estimate(found: Estimate) -> list[float]:
    """Value, low and high."""
    return [found.value, found.low, found.high]


def difference(table: pd.DataFrame, first: str, second: str) -> dict[str, Any] | None:
    """The paired difference of two labels as JSON; None for a strategy and itself."""
    found: Difference | None = None if first == second else differences(table, first, second)
    return None if found is None else {"value": estimate(found), "p": found.p, "shown": found.shown}


def main() -> None:
    """Write the file."""
    name, *runs = sys.argv[1:]
    table = pd.concat([tp.read_results(run) for run in runs], ignore_index=True)
    table = table.drop_duplicates(["label", "seed", "scene", "query"])
    first, rows = table.iloc[0], rows_of(table)
    found = {
        "model": first.model,
        "dataset": first.dataset,
        "split": first.split,
        "protocol": first.protocol,
        "environment": environment(Path(runs[0])),
        "queries": int(table.groupby("label").size().max()),
        "scenes": int(table.scene.nunique()),
        "rows": rows,
        "pairs": pairs_of(table),
        "orders": orders_of(table, rows),
    }
    short = json.loads(json.dumps(found), parse_float=lambda text: round(float(text), 5))
    text = json.dumps(short | {"orders": []}, indent=1)
    lines = ",\n  ".join(map(json.dumps, short["orders"]))
    text = text.replace('"orders": []', f'"orders": [\n  {lines}\n ]')
    (STORED / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
