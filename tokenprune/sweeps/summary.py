"""A sweep in numbers: gIoU and cIoU with intervals, and differences from the untouched model on the same queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tokenprune.errors import InputError
from tokenprune.evaluation.comparison.tables import si
from tokenprune.evaluation.metrics import precision_at, target_accuracy
from tokenprune.evaluation.statistics import (
    ENOUGH,
    Difference,
    Estimate,
    mean_interval,
    paired_difference,
    ratio_interval,
)
from tokenprune.sweeps.fingerprint import image_of

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import RenderableType

TOGETHER = ["model", "dataset", "split", "protocol"]
PAIRED = ["seed", "scene", "query"]
MEASURED = ["iou", "intersection", "union", "predicted", "size", "image_tokens", "equivalent_tokens", "flops"]
NEEDED = [*TOGETHER, *PAIRED, "label", "strategy", "budget", "scene_digest", "kv_bytes", *MEASURED]
REFERENCE = "none"
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Line:
    """One strategy at one budget, over all seeds.

    Attributes:
        model, dataset, split, protocol: what it ran on.
        label: the strategy with its options and budget.
        strategy, budget: of it.
        queries: how many.
        giou, ciou: with intervals.
        equivalent_tokens, tokens_ratio: mean, and its share of the image tokens.
        flops, flops_ratio: mean, and its share of the untouched model's; None where that was not run.
        kv_bytes: mean.
        difference: of the IoUs from the untouched model's on the same queries; None for itself, or without it.
        precision: P@X by threshold.
        no_target_accuracy, target_accuracy: N-acc and T-acc; None without queries of that kind.
    """

    model: str
    dataset: str
    split: str
    protocol: str
    label: str
    strategy: str
    budget: float | None
    queries: int
    giou: Estimate
    ciou: Estimate
    equivalent_tokens: float
    tokens_ratio: float
    flops: float
    flops_ratio: float | None
    kv_bytes: float
    difference: Difference | None = None
    precision: dict[float, float] = field(default_factory=dict)
    no_target_accuracy: float | None = None
    target_accuracy: float | None = None


def summarised(table: pd.DataFrame, reference: str = REFERENCE) -> list[Line]:
    """A line for each strategy and budget of a table of `tokenprune.read_results`, in its order.

    Args:
        table: with at least one row.
        reference: label of the strategy that others are compared with.

    Raises:
        InputError: a column is missing.
    """
    if missing := [name for name in NEEDED if name not in table.columns]:
        found = ", ".join(map(str, table.columns)) or "none"
        raise InputError(
            f"table: no column {', '.join(missing)}; found {found}; give what tokenprune.read_results returns"
        )
    lines: list[Line] = []
    for where, group in table.groupby(TOGETHER, sort=False, dropna=False):
        parts = dict(iter(group.groupby("label", sort=False)))
        base = parts.get(reference)
        lines.extend(
            _line(dict(zip(TOGETHER, where, strict=True)), str(label), part, base) for label, part in parts.items()
        )
    return lines


def scenes_of(part: pd.DataFrame) -> list[str]:
    """What tells scenes apart in a bootstrap: the digest of the image, equal for all seeds of the same picture."""
    return [image_of(digest) for digest in part.scene_digest]


def differences(table: pd.DataFrame, first: str, second: str) -> Difference | None:
    """The paired difference of two strategies, by their labels, on the queries that both ran on; None without any."""
    return _paired(table[table.label == first], table[table.label == second])


def _paired(first: pd.DataFrame, second: pd.DataFrame) -> Difference | None:
    """The difference on the queries that two parts of a table have in common; None without any."""
    both = first.merge(second, on=[*TOGETHER, *PAIRED])
    if both.empty:
        return None
    scenes = [image_of(digest) for digest in both.scene_digest_x]
    return paired_difference(both.iou_x.tolist(), both.iou_y.tolist(), scenes)


def _line(where: dict[str, Any], label: str, part: pd.DataFrame, base: pd.DataFrame | None) -> Line:
    scenes = scenes_of(part)
    difference = None if base is None or base is part else _paired(part, base)
    first, budget = part.iloc[0], part.budget.iloc[0]
    # notna: what stands for no size in a column of texts differs between releases of pandas
    without, within = target_accuracy(part["size"].notna().tolist(), (part.predicted == 0).tolist())
    tokens = float(part.equivalent_tokens.mean())
    flops = float(part.flops.mean())
    return Line(
        **where,
        label=label,
        strategy=str(first.strategy),
        budget=None if budget != budget else float(budget),
        queries=len(part),
        giou=mean_interval(part.iou.tolist(), scenes),
        ciou=ratio_interval(part.intersection.tolist(), part["union"].tolist(), scenes),
        equivalent_tokens=tokens,
        tokens_ratio=tokens / max(float(part.image_tokens.mean()), 1.0),
        flops=flops,
        flops_ratio=None if base is None else flops / float(base.flops.mean()),
        kv_bytes=float(part.kv_bytes.mean()),
        difference=difference,
        precision={threshold: precision_at(part.iou.tolist(), threshold) for threshold in THRESHOLDS},
        no_target_accuracy=without,
        target_accuracy=within,
    )


def verdict(difference: Difference | None) -> str:
    """A paired difference in words: "−0.042 [−0.060, −0.025]", or "no difference shown"."""
    if difference is None:
        return "–"
    if difference.too_few:
        return f"too few scenes ({difference.scenes} of {ENOUGH})"
    if not difference.shown:
        return "no difference shown"
    return f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"


def summary_table(lines: Sequence[Line]) -> RenderableType:
    """The lines as Rich tables, one for each model and dataset."""
    from rich.console import Group
    from rich.table import Table

    tables: dict[tuple[str, ...], Table] = {}
    most: dict[tuple[str, ...], int] = {}
    for line in lines:
        where = (line.model, line.dataset, line.split, line.protocol)
        most[where] = max(most.get(where, 0), line.queries)
    for line in lines:
        where = (line.model, line.dataset, line.split, line.protocol)
        if where not in tables:
            scenes = f" on {line.giou.scenes} scenes" if line.giou.scenes else ""
            title = f"{line.model} on {line.dataset} ({line.split}, {line.protocol}), {most[where]} queries{scenes}"
            tables[where] = Table(title=title, title_justify="left")
            for heading in ("strategy", "gIoU [95 %]", "cIoU [95 %]", "tokens", "FLOPs", f"gIoU against {REFERENCE}"):
                tables[where].add_column(heading, no_wrap=heading == "strategy")
        flops = si(line.flops) if line.flops_ratio is None else f"{line.flops_ratio:.2f}"
        tables[where].add_row(
            line.label if line.queries == most[where] else f"{line.label} ({line.queries} queries)",
            str(line.giou),
            str(line.ciou),
            f"{line.equivalent_tokens:.1f} ({line.tokens_ratio:.0%})",
            flops,
            verdict(line.difference),
        )
    return Group(*tables.values())
