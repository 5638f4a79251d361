"""Accumulates the results of each contender's queries, and computes its row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tokenprune.evaluation import metrics
from tokenprune.evaluation.accounting import QueryCost, mean_parts
from tokenprune.evaluation.comparison.results import Row
from tokenprune.evaluation.contenders import Contender
from tokenprune.evaluation.measured import mean
from tokenprune.evaluation.records import Record


@dataclass
class Accumulator:
    """The records of one contender's queries, in the order of the dataset, and what holds for all of them."""

    contender: Contender
    records: list[Record] = field(default_factory=list)
    policies: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    choice_flops: list[int] = field(default_factory=list)
    prefill_seconds: float | None = None
    is_untouched: bool = True  # until there is a decision
    reason: str | None = None  # why it cannot run
    failed: bool = False  # whether that is an error, and not a budget or a model that it does not fit

    def flops_by_part(self, head: int) -> dict[str, float]:
        """Mean FLOPs per query by part."""
        parts: dict[str, float] = dict(mean_parts([record.cost.flops for record in self.records]))
        if any(self.choice_flops):
            parts["strategy"] = sum(self.choice_flops) / len(self.choice_flops)
        if head:
            parts["mask_head"] = float(head)
        return parts

    def row(self, untouched: Untouched) -> Row:
        """The row of the results; `untouched` is the model without pruning, as the reference."""
        strategy, given, budget = self.contender.strategy, self.contender.given, self.contender.budget
        if self.reason is not None:
            options = strategy.options.model_dump(mode="json", fallback=repr)
            return Row(
                strategy=strategy.name,
                options=options,
                given=given,
                budget=budget,
                reason=self.reason,
                failed=self.failed,
            )
        costs = [record.cost for record in self.records]
        overlaps = [record.overlap for record in self.records]
        parts = self.flops_by_part(untouched.head_flops)
        flops = sum(parts.values())
        tokens = sum(cost.equivalent_tokens for cost in costs)
        seconds, full = self.prefill_seconds, untouched.prefill_seconds
        return Row(
            strategy=strategy.name,
            options=self.options,
            given=given,
            budget=budget,
            giou=metrics.giou(overlaps),
            ciou=metrics.ciou(overlaps),
            giou_by_kind=metrics.miou_by([record.kind for record in self.records], overlaps),
            miou_by_size=metrics.miou_by([record.size for record in self.records], overlaps),
            agreement=metrics.giou([record.agreement for record in self.records]),
            target_coverage=mean([record.coverage for record in self.records]),
            equivalent_tokens=tokens / len(costs),
            equivalent_tokens_ratio=tokens / max(sum(cost.image_tokens for cost in costs), 1),
            flops=flops,
            flops_ratio=flops / untouched.flops,
            flops_by_part=parts,
            kv_bytes=sum(cost.kv_bytes for cost in costs) / len(costs),
            prefill_ms=None if seconds is None else seconds * 1e3,
            prefill_speedup=None if not seconds or full is None else full / seconds,
            policies=self.policies,
            metrics={name: mean([record.metrics[name] for record in self.records]) for name in self.records[0].metrics},
        )


@dataclass
class Untouched:
    """The model without pruning: the reference of ratios."""

    costs: list[QueryCost] = field(default_factory=list)
    head_flops: int = 0
    prefill_seconds: float | None = None

    @property
    def flops(self) -> float:
        """Mean FLOPs per query, decoder and mask head."""
        return sum(mean_parts([cost.flops for cost in self.costs]).values()) + self.head_flops
