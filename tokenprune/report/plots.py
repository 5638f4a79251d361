"""The trade-off plot: a metric against the FLOPs saved, one curve per strategy."""

from __future__ import annotations

from itertools import cycle

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from tokenprune.errors import OptionError
from tokenprune.evaluation.comparison.results import Comparison
from tokenprune.report.markup import legend

METRICS = {
    "giou": "gIoU",
    "ciou": "cIoU",
    "agreement": "agreement with the unpruned masks (gIoU)",
    "target_coverage": "share of the target covered by kept tokens",
}

# Okabe and Ito's palette; markers and line styles distinguish curves without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
STYLES = ("-", "--", "-.", ":")


def tradeoff(comparison: Comparison, metric: str = "giou") -> Figure:
    """A curve over budgets for every strategy; strategies without a budget are points with a level line.

    Raises:
        OptionError: an unknown metric.
    """
    if metric not in METRICS:
        raise OptionError(f"metric {metric!r} found, expected one of {', '.join(METRICS)}")
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    looks = zip(cycle(COLOURS), cycle(MARKERS), cycle(STYLES), strict=False)
    entries = []
    for (label, points), (colour, marker, style) in zip(_curves(comparison, metric).items(), looks, strict=False):
        x, y, budgets = zip(*sorted(points, key=lambda point: -point[0]), strict=True)
        if all(budget is None for budget in budgets):
            axes.axhline(y[0], color="0.65", linewidth=1, linestyle=":", zorder=0)
            style = ""
        (line,) = axes.plot(
            x, y, linestyle=style, marker=marker, color=colour, markersize=7, linewidth=1.8, label=label
        )
        entries.append((line, label))
    for row in comparison.rows:
        if row.reason is not None:
            at = "" if row.budget is None else f" at {row.budget:g}"
            (line,) = axes.plot([], [], linestyle="", marker="x", color="0.5")
            entries.append((line, f"{row.label}{at}: did not run"))
    axes.set_xlabel("FLOPs saved per query, against the unpruned model")
    axes.set_ylabel(METRICS[metric])
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    title = f"{comparison.model} on {comparison.dataset} ({comparison.split}), {comparison.samples} queries"
    axes.set_title(title, parse_math=False)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    legend(axes, entries, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def _curves(comparison: Comparison, metric: str) -> dict[str, list[tuple[float, float, float | None]]]:
    """FLOPs saved, value and budget of every row, by label."""
    curves: dict[str, list[tuple[float, float, float | None]]] = {}
    for row in comparison.rows:
        value: float | None = getattr(row, metric)
        if value is not None and row.flops_ratio is not None:
            curves.setdefault(row.label, []).append((1 - row.flops_ratio, value, row.budget))
    return curves
