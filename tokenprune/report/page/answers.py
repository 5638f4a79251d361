"""The section of answers, as plain data for its script: a table, and scores against costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenprune.report.page.curves import Plot, Point, curves
from tokenprune.report.page.data import AnswerGroup
from tokenprune.sweeps.answer_summary import AnswerLine, ScoreEstimate

COSTS: dict[str, tuple[str, Callable[[AnswerLine], float | None]]] = {
    "tokens": ("equivalent tokens, share of the image tokens", lambda line: line.tokens_ratio),
    "flops": ("FLOPs, share of those without pruning", lambda line: line.flops_ratio),
}


def answer_data(group: AnswerGroup) -> dict[str, Any]:
    """Everything that the page shows of a group of answers."""
    return {
        "title": group.title,
        "metrics": list(group.metrics),
        "tradeoff": {
            metric: {cost: found for cost in COSTS if (found := tradeoff(group, metric, cost)) is not None}
            for metric in group.metrics
        },
        "rows": [_row(method, line) for method, lines in group.methods.items() for line in lines[::-1]],
    }


def tradeoff(group: AnswerGroup, metric: str, cost: str) -> Plot | None:
    """A score against a cost; None if no line has both."""
    axis, price = COSTS[cost]
    points = points_of(group, metric, price)
    if not any(points.values()):
        return None
    return curves(points, metric, axis, ".0%", group.metrics[metric])


def points_of(group: AnswerGroup, metric: str, price: Callable[[AnswerLine], float | None]) -> dict[str, list[Point]]:
    """The points of each method in the group's order, of the lines that have the metric and the cost."""
    found: dict[str, list[Point]] = {method: [] for method in group.order}
    for method, lines in group.methods.items():
        for line in lines:
            score, cost = line.scores.get(metric), price(line)
            if score is not None and cost is not None:
                found[method].append(Point(cost, score.estimate, line.label))
    return found


def _row(method: str, line: AnswerLine) -> dict[str, Any]:
    return {
        "strategy": method,
        "budget": line.budget,
        "answers": line.answers,
        "images": line.image_tokens,
        "tokens": line.equivalent_tokens,
        "share": line.tokens_ratio,
        "flops": line.flops_ratio,
        "scores": {metric: _score(score) for metric, score in line.scores.items()},
    }


def _score(score: ScoreEstimate) -> dict[str, Any]:
    return {"value": score.estimate.value, "interval": score.estimate.interval, "stderr": score.stderr}
