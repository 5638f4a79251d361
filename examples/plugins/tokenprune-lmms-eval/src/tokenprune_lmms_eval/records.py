"""What is recorded beside an answer: the strategy, and what its prefill cost."""

from __future__ import annotations

from typing import Any

from tokenprune.core.trace import Trace
from tokenprune.cost import DecoderSpec, count_flops
from tokenprune.errors import UnsupportedError
from tokenprune.evaluation.accounting import query_cost, row_ledger
from tokenprune.evaluation.contenders import Contender

KEY = "tokenprune"  # in `token_counts` of a sample


def decoder_spec(config: Any) -> DecoderSpec | None:
    """The decoder's sizes; None for a mixture of experts, whose FLOPs depend on routing."""
    try:
        return DecoderSpec.from_config(config)
    except UnsupportedError:
        return None


def record_of(
    contender: Contender, trace: Trace, row: int, spec: DecoderSpec | None, element_bytes: int
) -> dict[str, Any]:
    """Plain data about one answer, named as the columns of `tokenprune.read_results`.

    `ran` is the strategy with the options that ran; None in batches, where they differ between rows. `flops`, and
    `flops_unpruned` of the same prompt without pruning, are those of the decoder's prefill: its layers, attention rows
    that were computed for the strategy, and merges.

    Args:
        contender: the strategy.
        trace: of the prefill.
        row: of the batch.
        spec: None if FLOPs and bytes cannot be computed.
        element_bytes: of an entry of the KV cache.
    """
    ledger = row_ledger(trace.ledger, row)
    record: dict[str, Any] = {
        "strategy": contender.strategy.name,
        "label": contender.label,
        "given": contender.given,
        "budget": contender.budget,
        "ran": trace.strategy if len(trace.exists) == 1 else None,
        "image_tokens": ledger.image_tokens[0],
        "other_tokens": ledger.other_tokens[0],
        "equivalent_tokens": ledger.equivalent_tokens,
        "layers": [entry.image[0] for entry in ledger.entries],
    }
    if spec is None:
        return {**record, "flops": None, "flops_by_part": {}, "flops_unpruned": None, "kv_bytes": None}
    cost = query_cost(ledger, spec, element_bytes)
    return {
        **record,
        "flops": sum(cost.flops.values()),
        "flops_by_part": dict(cost.flops),
        "flops_unpruned": count_flops(ledger.unpruned(), spec).total,
        "kv_bytes": cost.kv_bytes,
    }
