"""The cost of one query, from the ledger of the batch that it ran in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tokenprune.core.ledger import LayerEntry, Ledger, LookAhead
from tokenprune.core.stage import Shape
from tokenprune.core.strategy import Strategy
from tokenprune.cost import ChoiceMeter, DecoderSpec, count_flops, kv_bytes, measure_flops
from tokenprune.evaluation.models import SegmentationModel


@dataclass(frozen=True)
class QueryCost:
    """Cost of one query's prefill.

    Attributes:
        equivalent_tokens: mean over layers of the image tokens entering them.
        image_tokens: N.
        flops: by part, 2 per multiply-add.
        kv_bytes: of real tokens, over all layers.

    Queries that share a batch row, as turns of one conversation do, share its FLOPs and bytes evenly.
    """

    equivalent_tokens: float
    image_tokens: int
    flops: Mapping[str, float]
    kv_bytes: float


def row_ledger(ledger: Ledger, row: int) -> Ledger:
    """The ledger of one batch row as if it had run alone: without padding and the filling of shorter rows."""
    image, other = (ledger.image_tokens[row],), (ledger.other_tokens[row],)
    entries = []
    entered = image[0]
    for e in ledger.entries:
        width = e.image[row] + e.other[row]
        ahead = tuple(_alone(own, entered + e.other[row], width) for own in e.ahead)
        cached = None if e.cached is None else (e.cached[row],)
        entries.append(LayerEntry(e.layer, (e.image[row],), (e.other[row],), width, e.scored_rows, ahead, cached))
        entered = e.image[row]
    merges = ledger.merge_weights // len(ledger.image_tokens)
    return Ledger(image, other, entries, merge_weights=merges)


def _alone(ahead: LookAhead, entered: int, kept: int) -> LookAhead:
    """What was computed ahead for a row of which `entered` tokens entered the stage and `kept` remained."""
    counts = {name: entered for name in ("keys", "queries", "values") if getattr(ahead, name) == ahead.keys}
    return replace(ahead, **counts, reused=kept if ahead.reused else 0)


def query_cost(ledger: Ledger, spec: DecoderSpec, element_bytes: int, queries: int = 1) -> QueryCost:
    """Cost of one of the `queries` of a one-row ledger: decoder layers, scored attention rows, merges of states."""
    flops = count_flops(ledger, spec, "exact")
    return QueryCost(
        ledger.equivalent_tokens,
        ledger.image_tokens[0],
        {part: count / queries for part, count in flops.parts.items() if count},
        kv_bytes(ledger, spec, element_bytes).total / queries,
    )


def head_flops(model: SegmentationModel, image: Any, query: str, sentence: bool) -> int:
    """FLOPs that a query needs outside the decoder (projection of its mask embedding, mask decoder), measured."""
    inputs = model.build_inputs(image, [query], is_sentence=[sentence])
    whole = measure_flops(model.segment, image, [query], is_sentence=[sentence])
    return max(whole - measure_flops(model.run_decoder, inputs), 0)


def own_work(model: SegmentationModel, inputs: Any, strategy: Strategy, layers: int) -> tuple[dict[str, Any], int]:
    """The options that a strategy runs with on one query, and the FLOPs of its own matmuls there, measured."""
    _, trace = model.run_decoder(inputs, strategy)
    assert trace is not None
    shape = shape_of(trace.ledger, layers)
    bound = strategy.bind(shape)
    flops = choice_flops(model, inputs, bound, shape) if trace.stages else 0
    return bound.options.model_dump(mode="json", fallback=repr), flops


def shape_of(ledger: Ledger, layers: int) -> Shape:
    """The shape of the first batch row."""
    return Shape(layers, ledger.image_tokens[0], ledger.other_tokens[0])


def choice_flops(model: SegmentationModel, inputs: Any, strategy: Strategy, shape: Shape) -> int:
    """FLOPs of the strategy's own matmuls on one query, measured: similarities, merges, projector runs."""
    meter = ChoiceMeter(strategy, shape)
    model.run_decoder(inputs, meter.strategy)
    return meter.flops


def mean_parts(parts: list[Mapping[str, float]]) -> dict[str, float]:
    """Mean of every part over queries."""
    total: Counter[str] = Counter()
    for one in parts:
        total.update(one)
    return {name: count / len(parts) for name, count in total.items()}
