"""Accounts without a model: the ledger that a strategy's declared stages give."""

from __future__ import annotations

from tokenprune.base import Shape, Strategy
from tokenprune.errors import BudgetError
from tokenprune.ledger import LayerEntry, Ledger
from tokenprune.planning import plan
from tokenprune.reads import AttentionFrom


def declared_ledger(strategy: Strategy, shape: Shape) -> Ledger:
    """The ledger of one row of this shape.

    Raises:
        BudgetError: a stage whose number of tokens only the content can tell.
    """
    _, planned = plan(strategy, [shape])
    ledger = Ledger((shape.image_tokens,), (shape.text_tokens,))
    active = shape.image_tokens
    for layer in range(shape.layers):
        ahead = []
        for stage in (p.stage for p in planned if p.stage.layer == layer):
            if any(isinstance(read, AttentionFrom) and not read.looks_back for read in stage.reads):
                ahead.append((active + shape.text_tokens, 1))
            if stage.tokens is None:
                raise BudgetError(
                    f"strategy {strategy.name!r}, stage {stage.name!r}: the number of tokens depends on the "
                    "image; give it a fixed number"
                )
            active = stage.tokens
        after = [read for p in planned if p.stage.layer == layer + 1 for read in p.stage.reads]
        scored = int(any(isinstance(read, AttentionFrom) and read.looks_back for read in after))
        width = active + shape.text_tokens
        ledger.entries.append(LayerEntry(layer, (active,), (shape.text_tokens,), width, scored, tuple(ahead)))
    return ledger
