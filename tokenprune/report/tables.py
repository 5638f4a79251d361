"""A comparison as Rich tables."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

if TYPE_CHECKING:
    from tokenprune.evaluation.results import Comparison, Row


def comparison_tables(comparison: Comparison) -> RenderableType:
    """The main table, one by kind of query and size of target, and what the columns mean."""
    budgets = {row.budget for row in comparison.rows if row.budget is not None}
    several = len(budgets) > 1
    added = [_of_plugins(comparison, several)] if any(row.metrics for row in comparison.rows) else []
    return Group(_Main(comparison, several), _by_group(comparison, several), *added)


def as_text(renderable: RenderableType, width: int = 120) -> str:
    """What a terminal of `width` columns would show, without colours."""
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(renderable)
    return stream.getvalue()


def si(value: float, unit: str = "") -> str:
    """A number with three digits and a prefix: 1.23 G."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


@dataclass(frozen=True)
class _Main:
    """Accuracy and cost in one table, or in two where the terminal is too narrow for one."""

    comparison: Comparison
    several_budgets: bool

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        whole = self._columns(list(COLUMNS), ACCURACY + COST)
        if Measurement.get(console, options.update(width=1000), whole).maximum <= options.max_width:
            yield whole
            return
        yield self._columns(list(COLUMNS)[:3], ACCURACY)
        yield self._columns(list(COLUMNS)[3:], COST)

    def _columns(self, names: list[str], caption: str) -> Table:
        found = self.comparison
        title = f"{found.model} on {found.dataset} ({found.split}), {found.samples} queries"
        if not self.several_budgets:
            title += f", budget {_budget(found.budget)}"
        table = _table(title, caption.strip(), self.several_budgets)
        for name in names:
            table.add_column(name, justify="right", no_wrap=True)
        for row in found.rows:
            table.add_row(*_name(row, self.several_budgets), *(COLUMNS[name](row) for name in names))
        return table


ACCURACY = "agree: gIoU against the untouched model's masks. "
COST = (
    "tokens: image tokens entering a layer, mean over layers. FLOPs: all that runs for one query. "
    "prefill: median for one query. In brackets: share of the untouched model's."
)
COLUMNS: dict[str, Callable[[Row], str]] = {
    "gIoU": lambda row: f"{row.giou:.3f}",
    "cIoU": lambda row: f"{row.ciou:.3f}",
    "agree": lambda row: f"{row.agreement:.3f}",
    "tokens": lambda row: f"{row.equivalent_tokens:.1f} ({row.equivalent_tokens_ratio:.3f})",
    "FLOPs": lambda row: f"{si(row.flops)} ({row.flops_ratio:.3f})",
    "KV": lambda row: si(row.kv_bytes, "B"),
    "prefill": lambda row: "–" if row.prefill_ms is None else f"{row.prefill_ms:.1f} ms",
    "speed-up": lambda row: "–" if row.prefill_speedup is None else f"{row.prefill_speedup:.2f}×",
}


def _table(title: str, caption: str, several_budgets: bool) -> Table:
    table = Table(title=escape(title), caption=caption, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("strategy", style="bold", min_width=9)
    if several_budgets:
        table.add_column("budget", justify="right")
    return table


def _name(row: Row, several_budgets: bool) -> list[str]:
    budget = ["–" if row.budget is None else f"{row.budget:g}"] if several_budgets else []
    return [escape(row.label), *budget]


def _by_group(comparison: Comparison, several_budgets: bool) -> Table:
    kinds = list(dict.fromkeys(kind for row in comparison.rows for kind in row.giou_by_kind))
    sizes = list(dict.fromkeys(size for row in comparison.rows for size in row.miou_by_size))
    sizes.sort(key=lambda size: ("small", "medium", "large").index(size))
    caption = "cover: mean share of the target's area whose place a token of the last stage holds"
    table = _table("gIoU by kind of query, mIoU by size of target", caption, several_budgets)
    for name in (*kinds, *sizes, "cover"):
        table.add_column(escape(name), justify="right", no_wrap=True)
    for row in comparison.rows:
        found = [row.giou_by_kind.get(kind) for kind in kinds] + [row.miou_by_size.get(size) for size in sizes]
        cells = ["–" if value is None else f"{value:.3f}" for value in (*found, row.target_coverage)]
        table.add_row(*_name(row, several_budgets), *cells)
    return table


def _of_plugins(comparison: Comparison, several_budgets: bool) -> Table:
    names = list(dict.fromkeys(name for row in comparison.rows for name in row.metrics))
    table = _table("metrics that plugins add, mean over queries", "", several_budgets)
    for name in names:
        table.add_column(escape(name), justify="right", no_wrap=True)
    for row in comparison.rows:
        values = [row.metrics.get(name) for name in names]
        table.add_row(*_name(row, several_budgets), *("–" if value is None else f"{value:.4g}" for value in values))
    return table


def _budget(budget: float | list[float]) -> str:
    return ", ".join(f"{value:g}" for value in budget) if isinstance(budget, list) else f"{budget:g}"
