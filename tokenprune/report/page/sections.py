"""The sections of a page, as plain data for its scripts."""

from __future__ import annotations

from typing import Any

from tokenprune.report.page import plots
from tokenprune.report.page.data import Group, Row, Study
from tokenprune.sweeps.summary import PAIRED, TOGETHER, differences

NEEDED = [*TOGETHER, *PAIRED, "label", "iou", "scene_digest"]


def group_data(group: Group) -> dict[str, Any]:
    """Everything that the page shows of a group, but for the gallery."""
    budgets: list[float | None] = [*group.budgets] or [None]
    by_budget = [
        {
            "budget": budget,
            "layers": plots.layers(group, budget),
            "kind": plots.accuracy_by(group, budget, "kind"),
            "size": plots.accuracy_by(group, budget, "size"),
            "times": plots.times(group, budget),
            "matrix": matrix(group, budget),
        }
        for budget in budgets
    ]
    tradeoffs = {
        metric: {cost: plots.tradeoff(group, metric, cost) for cost in plots.COSTS} for metric in plots.METRICS
    }
    return {
        "title": group.title,
        "queries": group.queries,
        "tradeoff": tradeoffs,
        "budgets": by_budget,
        "differences": plots.against_reference(group),
    }


def matrix(group: Group, budget: float | None) -> dict[str, Any]:
    """Paired differences of gIoU between all methods at a budget, row minus column.

    `cells` has a list for each row: None on the diagonal, else value, low, high, p and whether a difference is shown.
    """
    rows = group.at(budget)
    records = group.records[NEEDED]
    cells: list[list[dict[str, Any] | None]] = [[None] * len(rows) for _ in rows]
    for first in range(len(rows)):
        for second in range(first + 1, len(rows)):
            found = differences(records, rows[first].label, rows[second].label)
            if found is not None:
                same = {"p": found.p, "shown": found.shown}
                cells[first][second] = {"value": found.value, "low": found.low, "high": found.high, **same}
                cells[second][first] = {"value": -found.value, "low": -found.high, "high": -found.low, **same}
    return {"labels": [row.method for row in rows], "cells": cells}


def table_rows(study: Study) -> list[dict[str, Any]]:
    """A line of the table for each method, budget and group."""
    return [_table_row(group, row) for group in study.groups for row in group.rows]


def _table_row(group: Group, row: Row) -> dict[str, Any]:
    line = row.line
    found = {
        "model": line.model,
        "dataset": f"{line.dataset} ({line.split}, {line.protocol})",
        "strategy": row.method,
        "budget": line.budget,
        "queries": line.queries,
        "giou": line.giou.value,
        "giou_interval": [line.giou.low, line.giou.high],
        "ciou": line.ciou.value,
        "ciou_interval": [line.ciou.low, line.ciou.high],
        "tokens": line.equivalent_tokens,
        "share": line.tokens_ratio,
        "flops": line.flops,
        "flops_share": line.flops_ratio,
        "kv": line.kv_bytes,
        "prefill": plots.step_times(row).get("prefill"),
        "difference": None,
    }
    if line.difference is not None:
        one = line.difference
        found["difference"] = one.value
        found["difference_interval"] = [one.low, one.high]
        found["shown"] = one.shown
    return found
