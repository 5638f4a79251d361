"""The plots of a page, as plain data for plotly.js; the page's script adds colours, which depend on the theme.

A trace has `legendgroup`, the series that it belongs to, and `meta.slot`, the number of the series' colour: 0 to 7, or
−1 for grey. At most eight series are drawn; further ones are grey and wait in the legend.
"""

from __future__ import annotations

from collections.abc import Callable

from tokenprune.evaluation.metrics import SIZES
from tokenprune.evaluation.statistics import Estimate, mean_interval
from tokenprune.report.page.curves import SERIES, Plot, Point, bars, curves, legend, series, slot
from tokenprune.report.page.data import Group, Row
from tokenprune.sweeps.summary import REFERENCE, scenes_of, verdict
from tokenprune.utils.stopwatch import TOTAL

DASHES = ("solid", "8px,3px", "8px,2px,2px,2px", "2px,2px", "12px,3px", "12px,2px,2px,2px", "4px,4px", "6px,2px")
METRICS: dict[str, tuple[str, Callable[[Row], Estimate]]] = {
    "giou": ("gIoU", lambda row: row.line.giou),
    "ciou": ("cIoU", lambda row: row.line.ciou),
}
COSTS: dict[str, tuple[str, Callable[[Row], float]]] = {
    "tokens": ("equivalent tokens, share of the image tokens", lambda row: row.line.tokens_ratio),
    "flops": ("FLOPs per query", lambda row: row.line.flops),
    "kv": ("KV bytes per query", lambda row: row.line.kv_bytes),
}
STEPS = ("preprocess", "vision tower", "mask encoder", "pruning context", "prefill", "decoding", "mask decoder")
OTHER = "other"


def tradeoff(group: Group, metric: str, cost: str) -> Plot:
    """A metric against a cost: a curve for each method, with a band of 95 % intervals, and the Pareto front."""
    title, estimate = METRICS[metric]
    axis, price = COSTS[cost]
    methods = {
        method: [Point(price(row), estimate(row), row.label) for row in group.of(method)] for method in group.methods
    }
    return curves(methods, title, axis, ".0%" if cost == "tokens" else "~s")


def layers(group: Group, budget: float | None) -> Plot:
    """Image tokens entering each decoder layer, mean over queries."""
    traces = []
    for row in group.at(budget):
        entered = mean_layers(row)
        ends = [*range(len(entered)), len(entered)]
        texts = [f"{row.label}<br>layer {layer}: {tokens:.1f} tokens" for layer, tokens in enumerate(entered)]
        drawn: Plot = {"type": "scatter", "mode": "lines", "x": ends, "y": [*entered, entered[-1]]}
        dash = DASHES[slot(group.methods, row.method) % len(DASHES)]  # lines may coincide
        drawn.update(
            text=[*texts, texts[-1]], hovertemplate="%{text}<extra></extra>", line={"shape": "hv", "dash": dash}
        )
        traces.append(series(group.methods, row.method, drawn, role="curve"))
    y = {"title": {"text": "image tokens"}, "rangemode": "tozero"}
    depth = max(len(mean_layers(row)) for row in group.at(budget))
    layout = {"xaxis": {"title": {"text": "decoder layer"}, "range": [0, depth]}, "yaxis": y}
    return {"data": traces, "layout": layout, "legend": legend(group.methods, {row.method for row in group.at(budget)})}


def mean_layers(row: Row) -> list[float]:
    """Image tokens entering each decoder layer, mean over queries."""
    lists: list[list[int]] = row.records.layers.tolist()
    return [sum(entered) / len(lists) for entered in zip(*lists, strict=True)]


def accuracy_by(group: Group, budget: float | None, column: str) -> Plot:
    """gIoU of each kind of query, or size of target, with 95 % intervals.

    Args:
        group: of rows.
        budget: of the rows.
        column: "kind" or "size".
    """
    found: list[str] = group.records[column].dropna().unique().tolist()
    names = [size for size in SIZES if size in found] if column == "size" else found
    counts = group.rows[0].records[column].value_counts()
    traces = []
    for row in group.at(budget):
        parts = {name: row.records[row.records[column] == name] for name in names}
        have = [name for name in names if len(parts[name])]
        estimates = [mean_interval(parts[name].iou.tolist(), scenes_of(parts[name])) for name in have]
        texts = [f"{row.label}, {name}<br>gIoU {one}" for name, one in zip(have, estimates, strict=True)]
        drawn: Plot = {"type": "bar", "x": have, "y": [one.value for one in estimates], "error_y": bars(estimates)}
        drawn.update(text=texts, textposition="none", hovertemplate="%{text}<extra></extra>")
        traces.append(series(group.methods, row.method, drawn, role="bar"))
    ticks = [f"{name}<br>{int(counts.get(name, 0))}" for name in names]
    layout = {
        "barmode": "group",
        "xaxis": {"type": "category", "tickvals": names, "ticktext": ticks},
        "yaxis": {"title": {"text": "gIoU"}, "rangemode": "tozero"},
    }
    return {"data": traces, "layout": layout, "legend": legend(group.methods, {row.method for row in group.at(budget)})}


def times(group: Group, budget: float | None) -> Plot:
    """Milliseconds of each step for a query: the median over queries, one bar for each method."""
    rows = group.at(budget)[::-1]
    medians = [step_times(row) for row in rows]
    seen = {step for found in medians for step in found}
    steps = [step for step in (*STEPS, *sorted(seen - {*STEPS, OTHER}), OTHER) if step in seen]
    traces = []
    for number, step in enumerate(steps):
        drawn: Plot = {"type": "bar", "orientation": "h", "y": [row.label for row in rows], "legendgroup": step}
        drawn["x"] = [found.get(step, 0.0) for found in medians]
        drawn["hovertemplate"] = f"%{{y}}<br>{step} %{{x:.1f}} ms<extra></extra>"
        traces.append({**drawn, "meta": {"slot": number if number < SERIES else -1, "role": "bar"}})
    layout = {"barmode": "stack", "xaxis": {"title": {"text": "ms per query"}}, "yaxis": {"automargin": True}}
    entries = [
        {"name": step, "slot": number if number < SERIES else -1, "symbol": "square", "on": True}
        for number, step in enumerate(steps)
    ]
    return {"data": traces, "layout": layout, "legend": entries, "rows": len(rows)}


def step_times(row: Row) -> dict[str, float]:
    """Median milliseconds of each step; `OTHER` is what the steps leave of the total."""
    import pandas as pd

    table = pd.DataFrame(row.records.milliseconds.tolist()).fillna(0.0)
    steps = table.drop(columns=[TOTAL], errors="ignore")
    if TOTAL in table:
        steps = steps.assign(**{OTHER: (table[TOTAL] - steps.sum(axis=1)).clip(lower=0.0)})
    return {str(step): float(value) for step, value in steps.median().items()}


def against_reference(group: Group) -> Plot | None:
    """Differences of gIoU from the untouched model on the same queries; None where it was not run."""
    rows = [row for row in group.rows if row.line.difference is not None][::-1]
    if not rows:
        return None
    traces = []
    for shown in (True, False):
        some = [(row.label, row.line.difference) for row in rows if row.line.difference is not None]
        part = [(label, one) for label, one in some if one.shown is shown]
        estimates = [Estimate(one.value, one.low, one.high) for _, one in part]
        drawn: Plot = {"type": "scatter", "mode": "markers", "x": [one.value for one in estimates]}
        drawn.update(y=[label for label, _ in part], error_x=bars(estimates))
        drawn["text"] = [f"{label}<br>{verdict(one)}, p = {one.p:.3g}" for label, one in part]
        drawn["hovertemplate"] = "%{text}<extra></extra>"
        name = "difference shown" if shown else "no difference shown"
        traces.append({**drawn, "legendgroup": name, "meta": {"slot": 0 if shown else -1, "role": "point"}})
    order = {"categoryorder": "array", "categoryarray": [row.label for row in rows], "automargin": True}
    layout = {"xaxis": {"title": {"text": f"gIoU against {REFERENCE}"}, "zeroline": True}, "yaxis": order}
    entries = [
        {"name": "difference shown", "slot": 0, "symbol": "circle", "on": True},
        {"name": "no difference shown", "slot": -1, "symbol": "circle", "on": True},
    ]
    return {"data": traces, "layout": layout, "legend": entries, "rows": len(rows)}
