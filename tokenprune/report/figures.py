"""Figures of a sweep at the sizes of papers: trade-off curves with bands, and image tokens by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from tokenprune.report.markup import legend, one_line
from tokenprune.report.overlays import file_name
from tokenprune.report.page.answers import points_of
from tokenprune.report.page.curves import SERIES, Point
from tokenprune.report.page.data import AnswerGroup, Group, Study
from tokenprune.report.page.plots import METRICS, mean_layers
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
    models or datasets, after their names. Those of answers are `answers-METRIC-single`.
    """
    paths: list[Path] = []
    taken: set[str] = set()
    for number, group in enumerate(study.groups, 1):
        prefix = ""
        if len(study.groups) > 1:
            prefix = _prefix(f"{group.model} {group.dataset} {group.split} {group.protocol}", number, taken)
        with matplotlib.rc_context(LOOK):
            paths += _save_all(figures_of(group), folder, prefix)
    taken.clear()
    for number, answered in enumerate(study.answers, 1):
        prefix = ""
        if len(study.answers) > 1:
            prefix = _prefix(f"{answered.model} {answered.dataset} {answered.split}", number, taken)
        with matplotlib.rc_context(LOOK):
            paths += _save_all(figures_of_answers(answered), folder, prefix)
    return paths


def _prefix(text: str, number: int, taken: set[str]) -> str:
    prefix = file_name(text) + "-"
    prefix = f"{prefix}{number}-" if prefix in taken else prefix
    taken.add(prefix)
    return prefix


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


def figures_of_answers(group: AnswerGroup) -> dict[str, Figure]:
    """All figures of a group of answers, by name: each score against equivalent tokens."""
    found: dict[str, Figure] = {}
    for number, metric in enumerate(group.metrics, 1):
        name = f"answers-{file_name(metric)}-single"
        name = f"answers-{file_name(metric)}-{number}-single" if name in found else name
        found[name] = score_tradeoff(group, metric, SINGLE)
    return found


def tradeoff(group: Group, metrics: Sequence[str], width: float) -> Figure:
    """A metric against equivalent tokens, with bands of 95 % intervals; a panel for each metric."""
    figure, axes = _panels(len(metrics), width, share=False)
    handles: dict[str, Any] = {}
    for panel, metric in zip(axes, metrics, strict=True):
        title, estimate = METRICS[metric]
        points = {
            method: [Point(row.line.tokens_ratio, estimate(row), row.label) for row in group.of(method)]
            for method in group.methods
        }
        handles |= _draw(panel, points, title)
    _finish(figure, axes, handles, group.methods)
    return figure


def score_tradeoff(group: AnswerGroup, metric: str, width: float) -> Figure:
    """A score against equivalent tokens, with bands of 95 % intervals."""
    figure, axes = _panels(1, width, share=False)
    points = points_of(group, metric, lambda line: line.tokens_ratio)
    _finish(figure, axes, _draw(axes[0], points, metric), list(points))
    return figure


def _draw(panel: Any, methods: Mapping[str, Sequence[Point]], title: str) -> dict[str, Any]:
    """A curve for each method; the points of each, smallest number of tokens first. Returns the legend's handles."""
    handles: dict[str, Any] = {}
    for place, (method, points) in enumerate(methods.items()):
        if not points:
            continue
        x, found = [point.cost for point in points], [point.estimate for point in points]
        look = _look(place)
        values, low, high = ([getattr(one, name) for one in found] for name in ("value", "low", "high"))
        if len(points) > 1:
            panel.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0)
            (drawn,) = panel.plot(x, values, marker=look["marker"], color=look["color"])
        else:
            ends = [[values[0] - low[0]], [high[0] - values[0]]]
            look = {"marker": look["marker"], "color": look["color"], "elinewidth": 0.8}
            drawn = panel.errorbar(x, values, ends, linestyle="", **look)
        if place < SERIES:
            handles[method] = drawn
    panel.set_xlabel("equivalent tokens")
    panel.set_ylabel(one_line(title), parse_math=False)
    panel.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return handles


def layers(group: Group, budgets: Sequence[float | None], width: float) -> Figure:
    """Image tokens entering each decoder layer, mean over queries; a panel for each budget."""
    figure, axes = _panels(len(budgets), width, share=True)
    handles: dict[str, Any] = {}
    for panel, budget in zip(axes, budgets, strict=True):
        for row in group.at(budget):
            place = group.methods.index(row.method)
            entered = mean_layers(row)
            look = _look(place)
            drawn = panel.stairs(
                entered, baseline=None, color=look["color"], linestyle=look["linestyle"], linewidth=1.1
            )
            if place < SERIES:
                handles.setdefault(row.method, drawn)
        panel.set(xlabel="decoder layer", title="" if budget is None else f"budget {budget:g}")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        panel.set_ylim(bottom=0)
    axes[0].set_ylabel("image tokens")
    _finish(figure, axes, handles, group.methods)
    return figure


def _look(place: int) -> dict[str, Any]:
    if place >= SERIES:
        return {"color": GREY, "marker": ".", "linestyle": "-"}
    return {"color": COLOURS[place], "marker": MARKERS[place], "linestyle": STYLES[place]}


def _panels(count: int, width: float, *, share: bool) -> tuple[Figure, list[Any]]:
    height = 2.6 if width == SINGLE else 2.5
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False, sharey=share)[0])


def _finish(figure: Figure, axes: Sequence[Any], handles: Mapping[str, Any], order: list[str]) -> None:
    """Grids, and a legend of the methods that have a handle, in order."""
    for panel in axes:
        panel.grid(color="0.9", linewidth=0.5)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    entries = [(handles[method], method) for method in order if method in handles]
    columns = 4 if figure.get_figwidth() == SINGLE else 8
    place = {"loc": "outside lower center", "ncols": columns, "frameon": False}
    legend(figure, entries, **place, handlelength=1.8, columnspacing=1.0)


def _save_all(figures: Mapping[str, Figure], folder: Path, prefix: str) -> list[Path]:
    return [
        _save(figure, folder / f"{prefix}{name}.{suffix}") for name, figure in figures.items() for suffix in FORMATS
    ]


def _save(figure: Figure, path: Path) -> Path:
    kind = path.suffix[1:]
    still = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=DPI, facecolor="white", metadata=still)
    return path
