"""A comparison as Rich tables."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from tokenprune.core.stage import RENUMBERS
from tokenprune.utils.split_tables import Column, Parted

if TYPE_CHECKING:
    from tokenprune.evaluation.comparison.results import Comparison, Row


def comparison_tables(comparison: Comparison) -> RenderableType:
    """The main table, the one by kind of query and size of target, their legends, warnings, and why rows failed."""
    parts: list[RenderableType] = [_main(comparison), _by_group(comparison)]
    if any(row.metrics for row in comparison.rows):
        parts.append(_of_plugins(comparison))
    for row in comparison.rows:
        if row.prefill_warning is not None:
            words = (("warning: ", "yellow"), (_called(row), "bold"), f": {row.prefill_warning}")
            parts.append(Padding(Text.assemble(*words), (0, 1)))
        if row.reason is not None:
            parts.append(Padding(Text.assemble((_called(row), "bold"), f" did not run: {row.reason}"), (0, 1)))
    renumbered = dict.fromkeys(row.label for row in comparison.rows if row.positions_warning is not None)
    if renumbered:
        parts.append(Padding(Text.assemble(("note: ", "yellow"), f"{', '.join(renumbered)}: {RENUMBERS}"), (0, 1)))
    return Group(*parts)


def as_text(renderable: RenderableType, width: int = 120) -> str:
    """The text on a terminal of `width` columns, without colours."""
    stream = io.StringIO()
    # In a notebook Rich would display it instead of writing to the stream.
    Console(file=stream, width=width, color_system=None, force_jupyter=False).print(renderable)
    return stream.getvalue()


def si(value: float, unit: str = "") -> str:
    """A number with three digits and a prefix: 1.23 G."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


MISSING = "–"
ACCURACY = "agree: gIoU against the untouched model's masks."
COST = (
    "tokens: image tokens entering a layer, mean over layers. FLOPs: all that runs for one query. "
    "prefill: median for one query. In brackets: share of the untouched model's."
)


def _main(found: Comparison) -> Parted:
    title = f"{found.model} on {found.dataset} ({found.split}), {found.samples} queries"
    if not _shows_budgets(found):
        title += f", budget {_budget(found.budget)}"
    accuracy: dict[str, Callable[[Row], str]] = {
        "gIoU": lambda row: _number(row.giou, ".3f"),
        "cIoU": lambda row: _number(row.ciou, ".3f"),
        "agree": lambda row: _number(row.agreement, ".3f"),
    }
    cost: dict[str, Callable[[Row], str]] = {
        "tokens": lambda row: _number(row.equivalent_tokens, ".1f") + _share(row.equivalent_tokens_ratio),
        "FLOPs": lambda row: (MISSING if row.flops is None else si(row.flops)) + _share(row.flops_ratio),
        "KV": lambda row: MISSING if row.kv_bytes is None else si(row.kv_bytes, "B"),
        "prefill": lambda row: _number(row.prefill_ms, ".1f", " ms"),
        "speed-up": lambda row: _number(row.prefill_speedup, ".2f", "×"),
    }
    groups = [
        ([Column(head, [cell(row) for row in found.rows]) for head, cell in columns.items()], text)
        for columns, text in ((accuracy, ACCURACY), (cost, COST))
    ]
    return _table(found, title, groups)


def _by_group(found: Comparison) -> Parted:
    kinds = list(dict.fromkeys(kind for row in found.rows for kind in row.giou_by_kind))
    sizes = list(dict.fromkeys(size for row in found.rows for size in row.miou_by_size))
    sizes.sort(key=lambda size: ("small", "medium", "large").index(size))
    columns = [Column(kind, [_number(row.giou_by_kind.get(kind), ".3f") for row in found.rows]) for kind in kinds]
    columns += [Column(size, [_number(row.miou_by_size.get(size), ".3f") for row in found.rows]) for size in sizes]
    columns.append(Column("cover", [_number(row.target_coverage, ".3f") for row in found.rows]))
    caption = "cover: mean share of the target's area whose place a token of the last stage holds"
    return _table(found, "gIoU by kind of query, mIoU by size of target", [(columns, caption)])


def _of_plugins(found: Comparison) -> Parted:
    names = list(dict.fromkeys(name for row in found.rows for name in row.metrics))
    columns = [Column(name, [_number(row.metrics.get(name), ".4g") for row in found.rows]) for name in names]
    return _table(found, "metrics that plugins add, mean over queries", [(columns, "")])


def _table(found: Comparison, title: str, groups: list[tuple[list[Column], str]]) -> Parted:
    names = Column("strategy", [row.label for row in found.rows])
    budgets = Column("budget", [_number(row.budget, "g") for row in found.rows])
    if not _shows_budgets(found):
        return Parted(title, names, groups)
    return Parted(title, names, groups, [budgets], tight_names=Column("strategy", [_called(row) for row in found.rows]))


def _shows_budgets(found: Comparison) -> bool:
    """Whether to show a column of budgets: not all rows that take a budget ran at the same one."""
    return any(row.budget != found.budget for row in found.rows if row.budget is not None or row.options)


def _called(row: Row) -> str:
    return row.label if row.budget is None else f"{row.label} at {row.budget:g}"


def _number(value: float | None, kind: str, unit: str = "") -> str:
    return MISSING if value is None else f"{value:{kind}}{unit}"


def _share(value: float | None) -> str:
    return "" if value is None else f" ({value:.3f})"


def _budget(budget: float | list[float]) -> str:
    return ", ".join(f"{value:g}" for value in budget) if isinstance(budget, list) else f"{budget:g}"
