"""A comparison as Rich tables."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from tokenprune.evaluation.results import Comparison, Row


def comparison_tables(comparison: Comparison) -> RenderableType:
    """The main table, one by kind of query and size of target, and what the columns mean."""
    budgets = {row.budget for row in comparison.rows if row.budget is not None}
    return Group(_main(comparison, len(budgets) > 1), _by_group(comparison, len(budgets) > 1))


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


def _main(comparison: Comparison, several_budgets: bool) -> Table:
    title = f"{comparison.model} on {comparison.dataset} ({comparison.split}), {comparison.samples} queries"
    if not several_budgets:
        title += f", budget {_budget(comparison.budget)}"
    caption = (
        "agree: gIoU against the untouched model's masks; tokens: image tokens entering a layer, mean over layers; "
        "FLOPs: all that runs for one query; prefill: median for one query"
    )
    table = Table(title=escape(title), caption=caption, box=box.SIMPLE_HEAD)
    table.add_column("strategy", style="bold")
    if several_budgets:
        table.add_column("budget", justify="right")
    for name in ("gIoU", "cIoU", "agree", "tokens", "ratio", "FLOPs", "ratio", "KV", "prefill", "speed-up"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in comparison.rows:
        table.add_row(*_cells(row, several_budgets))
    return table


def _cells(row: Row, several_budgets: bool) -> Iterable[str]:
    yield escape(row.label)
    if several_budgets:
        yield "–" if row.budget is None else f"{row.budget:g}"
    yield f"{row.giou:.3f}"
    yield f"{row.ciou:.3f}"
    yield f"{row.agreement:.3f}"
    yield f"{row.equivalent_tokens:.1f}"
    yield f"{row.equivalent_tokens_ratio:.3f}"
    yield si(row.flops)
    yield f"{row.flops_ratio:.3f}"
    yield si(row.kv_bytes, "B")
    yield "–" if row.prefill_ms is None else f"{row.prefill_ms:.1f} ms"
    yield "–" if row.prefill_speedup is None else f"{row.prefill_speedup:.2f}×"


def _by_group(comparison: Comparison, several_budgets: bool) -> Table:
    kinds = list(dict.fromkeys(kind for row in comparison.rows for kind in row.giou_by_kind))
    sizes = list(dict.fromkeys(size for row in comparison.rows for size in row.miou_by_size))
    sizes.sort(key=lambda size: ("small", "medium", "large").index(size))
    caption = "cover: mean share of the target's area whose place a token of the last stage holds"
    table = Table(title="gIoU by kind of query, mIoU by size of target", caption=caption, box=box.SIMPLE_HEAD)
    table.add_column("strategy", style="bold")
    if several_budgets:
        table.add_column("budget", justify="right")
    for name in (*kinds, *sizes, "cover"):
        table.add_column(escape(name), justify="right", no_wrap=True)
    for row in comparison.rows:
        found = [row.giou_by_kind.get(kind) for kind in kinds] + [row.miou_by_size.get(size) for size in sizes]
        cells = ["–" if value is None else f"{value:.3f}" for value in (*found, row.target_coverage)]
        budget = ["–" if row.budget is None else f"{row.budget:g}"] if several_budgets else []
        table.add_row(escape(row.label), *budget, *cells)
    return table


def _budget(budget: float | list[float]) -> str:
    return ", ".join(f"{value:g}" for value in budget) if isinstance(budget, list) else f"{budget:g}"
