"""FastV (Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", arXiv 2403.06764)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pydantic import Field

from tokenprune.core.decisions import Decision, Keep
from tokenprune.core.options import QUERY_REDUCE, Amount, QueryReduce, tokens_of
from tokenprune.core.reads import AttentionFrom
from tokenprune.core.stage import Shape, Stage
from tokenprune.core.strategy import Strategy, StrategyOptions
from tokenprune.core.tokens import Tokens
from tokenprune.errors import OptionError
from tokenprune_strategies.ops.allocation import random_scores


class FastV(Strategy):
    """Keep the image tokens that the query row attends to most, after an early layer.

    Layers 0 … K−1 run in full; by the attention of layer K−1 (mean over heads) the best image tokens and all text go
    on, at their original positions. K = 0 keeps random tokens. Every batch row chooses for itself (ours; the
    authors' code takes row 0's choice for all), and the query row is an option (the authors take the last row); where a
    batch row has several, `query_reduce` says how they count (ours).
    """

    name = "fastv"
    budget_option = "keep"
    budget_layer = ("layer", 1)

    class Options(StrategyOptions):
        """Options of FastV."""

        layer: int = Field(2, ge=0, description="K, the first layer without the dropped tokens; 0 = random tokens")
        keep: Amount = Field(0.5, description="image tokens kept: an int counts them, a float is a share")
        query: str = Field("mask_query", description='query row whose attention counts: "mask_query", "last", "seg", …')
        query_reduce: QueryReduce = Field("mean", description=QUERY_REDUCE)
        seed: int = Field(0, description="seed of the draw where layer = 0")

    options: Options

    def without_effect(self) -> Mapping[str, str]:
        """See `Strategy.without_effect`."""
        if self.options.layer:
            return {"seed": "unless layer=0"}
        return dict.fromkeys(("query", "query_reduce"), "with layer=0, where the draw is random")

    def stages(self, shape: Shape) -> Iterable[Stage]:
        """One stage at layer K. Raises OptionError where the model has no layer K."""
        layer = self.options.layer
        if layer >= shape.layers:
            raise OptionError(
                f"strategy 'fastv': option 'layer': found {layer}, but the model has {shape.layers} layers; "
                f"choose one of 0 … {shape.layers - 1}"
            )
        reads = (AttentionFrom(self.options.query, self.options.query_reduce),) if layer else ()
        yield Stage("prune", layer, tokens_of(self.options.keep, shape.image_tokens), reads)

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        """Keep the most attended tokens."""
        scores = tokens.attention if stage.layer else random_scores(tokens, self.options.seed)
        return Keep.top(scores, tokens.target)
