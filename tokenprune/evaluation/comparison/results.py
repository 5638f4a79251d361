"""The results of a comparison: rows of numbers, as JSON and as a table."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, PrivateAttr, computed_field

from tokenprune.core.stage import RENUMBERS

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

    from tokenprune.evaluation.samples import SampleRecord


class Row(BaseModel):
    """One strategy at one budget; if it could not run, the `reason`, and None for every number.

    Attributes:
        strategy: registered name.
        options: the options that were used, those from a budget included.
        given: the options that the user gave, which distinguish rows of one strategy.
        budget: the requested budget; None if the strategy takes none.
        giou, ciou: against the targets.
        giou_by_kind: by the dataset's kinds of queries.
        miou_by_size: mean IoU by size bucket of the target.
        agreement: gIoU against the untouched model's masks.
        target_coverage: mean share of the target's area whose place a kept token of the last stage has.
        equivalent_tokens: mean over decoder layers and queries of the image tokens entering the layer.
        equivalent_tokens_ratio: the same over the number of image tokens.
        flops: mean per query, 2 per multiply-add (convention `exact`): all computations for a query; see `compare`.
        flops_ratio: to the untouched model.
        flops_by_part: the same by part: decoder, scorer, merge, strategy, mask_head.
        kv_bytes: of the KV cache after prefill, per query.
        prefill_ms: median milliseconds of one query's prefill, including the strategy's own work; None if not measured.
        prefill_speedup: the untouched model's median over this one.
        policies: positions, query rows, padding: to be reported with every result.
        metrics: mean over queries of each metric that a plugin adds; None if it is not defined for any query.
        reason: why it could not run; None if it did.
        failed: whether that is an error, and not a budget or a model that it does not fit.
    """

    model_config = ConfigDict(frozen=True)

    strategy: str
    options: dict[str, Any]
    given: dict[str, Any] = {}
    budget: float | None = None
    giou: float | None = None
    ciou: float | None = None
    giou_by_kind: dict[str, float] = {}
    miou_by_size: dict[str, float] = {}
    agreement: float | None = None
    target_coverage: float | None = None
    equivalent_tokens: float | None = None
    equivalent_tokens_ratio: float | None = None
    flops: float | None = None
    flops_ratio: float | None = None
    flops_by_part: dict[str, float] = {}
    kv_bytes: float | None = None
    prefill_ms: float | None = None
    prefill_speedup: float | None = None
    policies: dict[str, str] = {}
    metrics: dict[str, float | None] = {}
    reason: str | None = None
    failed: bool = False

    @property
    def label(self) -> str:
        """Name and the options that the user gave: "csp (query=seg)"."""
        given = ", ".join(f"{key}={value}" for key, value in self.given.items())
        return f"{self.strategy} ({given})" if given else self.strategy

    @computed_field  # type: ignore[prop-decorator]
    @property
    def prefill_warning(self) -> str | None:
        """What a reader of the times must not miss: that pruning made the prefill slower. None if it did not."""
        if self.prefill_ms is None or self.prefill_speedup is None or self.prefill_speedup >= 1:
            return None
        without = self.prefill_ms * self.prefill_speedup
        return f"prefill is slower than without pruning: {self.prefill_ms:.1f} ms against {without:.1f} ms"

    @computed_field  # type: ignore[prop-decorator]
    @property
    def positions_warning(self) -> str | None:
        """That positions were renumbered, which on segmentation models often costs more than the choice of tokens. None
        if they were kept."""
        return RENUMBERS if "renumber" in self.policies.get("positions", "") else None


class Comparison(BaseModel):
    """Strategies on one model and one dataset. Printing it (`rich.print`, or `print`) shows the table."""

    model_config = ConfigDict(frozen=True)

    model: str
    dataset: str
    split: str
    samples: int
    budget: float | list[float]
    environment: dict[str, str | int]
    rows: list[Row]
    _records: list[SampleRecord] = PrivateAttr(default_factory=list)

    @property
    def records(self) -> list[SampleRecord]:
        """A few samples with their masks and traces, for pictures; not part of the JSON."""
        return self._records

    def to_json(self, indent: int | None = 2) -> str:
        """One JSON object: model, dataset, split, samples, budget, environment, rows."""
        try:
            return self.model_dump_json(indent=indent)
        except ValueError:  # text that is not valid Unicode, such as a folder's name, can still be escaped
            return json.dumps(self.model_dump(), indent=indent, default=repr)

    def table(self) -> RenderableType:
        """The rows as Rich tables."""
        from tokenprune.evaluation.comparison.tables import comparison_tables

        return comparison_tables(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.table()

    def __str__(self) -> str:
        from tokenprune.evaluation.comparison.tables import as_text

        return as_text(self.table())
