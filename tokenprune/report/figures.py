"""Figures of a sweep at the sizes of papers: trade-off curves with bands, and image tokens by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from tokenprune.report.overlays import file_name
from tokenprune.report.page.data import Group, Study
from tokenprune.report.page.plots import METRICS, SERIES, mean_layers
from tokenprune.utils.files import replacing

SINGLE, DOUBLE = 3.3, 6.9  # inches: one column, and two
FORMATS = ("png", "svg", "pdf")
DPI = 300
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLES = ("-", (0, (5, 2)), (0, (5, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)), (0, (8, 1, 1, 1)), (0, (2, 2)), (0, (3, 1)))
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#B0478D", "#A87400", "#3D9BD6", "#6A3D9A", "#7A6A4F")
GREY = "0.7"
LOOK: dict[Any, Any] = {
    "font.size": 7,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.5,
    "pdf.fonttype": 42,  # TrueType, which publishers ask for
    "svg.hashsalt": "tokenprune",  # equal ids in every run
}


def write_figures(study: Study, folder: Path) -> list[Path]:
    """Write every figure as PNG, SVG and PDF; returns the paths. Raises InputError if one cannot be written.

    The names are `tradeoff-giou-single`, `tradeoff-ciou-single`, `tradeoff-double` (both), `layers-BUDGET-single` (0_35
    for 0.35, since LaTeX dislikes points in names) and `layers-double` (of up to four budgets); where there are several
    models or datasets, after their names.
    """
    paths: list[Path] = []
    taken: set[str] = set()
    for number, group in enumerate(study.groups, 1):
        prefix = ""
        if len(study.groups) > 1:
            prefix = file_name(f"{group.model} {group.dataset} {group.split} {group.protocol}") + "-"
            prefix = f"{prefix}{number}-" if prefix in taken else prefix
            taken.add(prefix)
        with matplotlib.rc_context(LOOK):
            for name, figure in figures_of(group).items():
                paths += [_save(figure, folder / f"{prefix}{name}.{suffix}") for suffix in FORMATS]
    return paths


def figures_of(group: Group) -> dict[str, Figure]:
    """All figures of a group, by name."""
    found = {f"tradeoff-{metric}-single": tradeoff(group, [metric], SINGLE) for metric in METRICS}
    found["tradeoff-double"] = tradeoff(group, [*METRICS], DOUBLE)
    budgets: list[float | None] = [*group.budgets] or [None]
    for budget in budgets:
        name = "layers-single" if budget is None else f"layers-{budget:g}-single".replace(".", "_")
        found[name] = layers(group, [budget], SINGLE)
    found["layers-double"] = layers(group, budgets[:4], DOUBLE)
    return found


def tradeoff(group: Group, metrics: Sequence[str], width: float) -> Figure:
    """A metric against equivalent tokens, with bands of 95 % intervals; a panel for each metric."""
    figure, axes = _panels(len(metrics), width, share=False)
    for panel, metric in zip(axes, metrics, strict=True):
        title, estimate = METRICS[metric]
        for place, method in enumerate(group.methods):
            rows = group.of(method)
            x, found = [row.line.tokens_ratio for row in rows], [estimate(row) for row in rows]
            look = _look(place)
            label = method if place < SERIES else None
            values, low, high = ([getattr(one, name) for one in found] for name in ("value", "low", "high"))
            if len(rows) > 1:
                panel.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0)
                panel.plot(x, values, label=label, marker=look["marker"], color=look["color"])
            else:
                ends = [[values[0] - low[0]], [high[0] - values[0]]]
                look = {"marker": look["marker"], "color": look["color"], "elinewidth": 0.8}
                panel.errorbar(x, values, ends, label=label, linestyle="", **look)
        panel.set(xlabel="equivalent tokens", ylabel=title)
        panel.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _finish(figure, axes, group.methods)
    return figure


def layers(group: Group, budgets: Sequence[float | None], width: float) -> Figure:
    """Image tokens entering each decoder layer, mean over queries; a panel for each budget."""
    figure, axes = _panels(len(budgets), width, share=True)
    for panel, budget in zip(axes, budgets, strict=True):
        for row in group.at(budget):
            place = group.methods.index(row.method)
            entered = mean_layers(row)
            look = _look(place)
            panel.stairs(
                entered,
                baseline=None,
                color=look["color"],
                linestyle=look["linestyle"],
                linewidth=1.1,
                label=row.method if place < SERIES else None,
            )
        panel.set(xlabel="decoder layer", title="" if budget is None else f"budget {budget:g}")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        panel.set_ylim(bottom=0)
    axes[0].set_ylabel("image tokens")
    _finish(figure, axes, group.methods)
    return figure


def _look(place: int) -> dict[str, Any]:
    if place >= SERIES:
        return {"color": GREY, "marker": ".", "linestyle": "-"}
    return {"color": COLOURS[place], "marker": MARKERS[place], "linestyle": STYLES[place]}


def _panels(count: int, width: float, *, share: bool) -> tuple[Figure, list[Any]]:
    height = 2.6 if width == SINGLE else 2.5
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False, sharey=share)[0])


def _finish(figure: Figure, axes: Sequence[Any], order: list[str]) -> None:
    for panel in axes:
        panel.grid(color="0.9", linewidth=0.5)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    found = zip(*axes[0].get_legend_handles_labels(), strict=True)
    handles, labels = zip(*sorted(found, key=lambda pair: order.index(pair[1])), strict=True)
    columns = 4 if figure.get_figwidth() == SINGLE else 8
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, handlelength=1.8, columnspacing=1.0
    )


def _save(figure: Figure, path: Path) -> Path:
    kind = path.suffix[1:]
    still = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=DPI, facecolor="white", metadata=still)
    return path
