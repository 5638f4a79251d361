"""What plots have in common: series with their colours and legends, and a score against a cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenprune.evaluation.statistics import Estimate
from tokenprune.report.pareto import front

Plot = dict[str, Any]
SERIES = 8
SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "star")


@dataclass(frozen=True)
class Point:
    """One method at one budget.

    Attributes:
        cost: of a query.
        estimate: of the score.
        label: the method with its budget.
    """

    cost: float
    estimate: Estimate
    label: str


def curves(
    methods: Mapping[str, Sequence[Point]],
    title: str,
    axis: str,
    tickformat: str,
    higher_is_better: bool = True,
) -> Plot:
    """A score against a cost: a curve for each method, with a band of 95 % intervals, and the Pareto front.

    Args:
        methods: the points of each, in any order; some may have none, but not all.
        title: of the score.
        axis: what is told of the cost.
        tickformat: of the cost.
        higher_is_better: whether a larger score is a better one.
    """
    order = list(methods)
    traces: list[Plot] = []
    for method, points in methods.items():
        if not points:
            continue
        some = sorted(points, key=lambda point: point.cost)
        x, found = [point.cost for point in some], [point.estimate for point in some]
        spread = any(one.interval for one in found)
        if len(some) > 1 and spread:
            band = {"x": [*x, *x[::-1]], "y": [*(one.high for one in found), *(one.low for one in found[::-1])]}
            area = {"mode": "lines", "fill": "toself", "line": {"width": 0}, "hoverinfo": "skip"}
            traces.append(series(order, method, {"type": "scatter", **band, **area}, role="band"))
        lone = {"error_y": bars(found)} if len(some) == 1 and spread else {}
        drawn = {"type": "scatter", "mode": "lines+markers", "x": x, "y": [one.value for one in found], **lone}
        drawn["text"] = [f"{point.label}<br>{title} {point.estimate}" for point in some]
        drawn["hovertemplate"] = "%{text}<extra></extra>"
        traces.append(series(order, method, drawn, role="curve"))
    sign = 1 if higher_is_better else -1
    every = [(point.cost, sign * point.estimate.value) for points in methods.values() for point in points]
    line = {"shape": "hv", "dash": "dot", "width": 1.5}
    edge = {"type": "scatter", "mode": "lines", "line": line, "hoverinfo": "skip", "legendgroup": "Pareto front"}
    xs, ys = zip(*front(every), strict=True)
    traces.append({**edge, "x": list(xs), "y": [sign * y for y in ys], "meta": {"slot": -2, "role": "front"}})
    costs = {"title": {"text": axis}, "rangemode": "tozero", "tickformat": tickformat}
    extra = [{"name": "Pareto front", "slot": -2, "symbol": "line", "on": True}]
    return {
        "data": traces,
        "layout": {"xaxis": costs, "yaxis": {"title": {"text": title}}},
        "legend": legend(order, [method for method, points in methods.items() if points]) + extra,
    }


def slot(order: Sequence[str], method: str) -> int:
    """The number of a method's colour; −1 is grey."""
    place = order.index(method)
    return place if place < SERIES else -1


def series(order: Sequence[str], method: str, trace: Plot, role: str) -> Plot:
    """A trace of one of the methods, whose role is "curve", "band", "bar", …"""
    number = slot(order, method)
    found = {**trace, "legendgroup": method, "meta": {"slot": number, "role": role}}
    if number >= 0:
        found["meta"]["symbol"] = SYMBOLS[number]
    else:
        found["visible"] = False
    return found


def legend(order: Sequence[str], shown: Iterable[str] | None = None) -> list[Plot]:
    """Entries of the methods that are shown; None = all."""
    among = set(order if shown is None else shown)
    entries = []
    for method in order:
        number = slot(order, method)
        if method in among:
            symbol = SYMBOLS[number] if number >= 0 else "circle"
            entries.append({"name": method, "slot": number, "symbol": symbol, "on": number >= 0})
    return entries


def bars(estimates: Sequence[Estimate]) -> Plot:
    """Intervals as error bars."""
    above = [one.high - one.value for one in estimates]
    below = [one.value - one.low for one in estimates]
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 1, "width": 2}
