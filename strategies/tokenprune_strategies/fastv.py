"""FastV (Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", https://arxiv.org/abs/2403.06764)."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from tokenprune import AttentionFrom, Positions, ScorerStrategy, Stage, StrategyOptions, Tokens
from tokenprune.core.options import KEPT, POSITIONS, QUERY, QUERY_REDUCE, Amount, QueryReduce
from tokenprune_strategies.ops.even_and_random import random_scores


class FastV(ScorerStrategy):
    """Layers before K run in full; from K on, only the image tokens that the query row attended to most. Ours: batch
    rows are independent (authors: row 0 for all), and any query row can be used (authors: the last)."""

    name = "fastv"
    budget_layer = ("layer", 1)

    class Options(StrategyOptions):
        layer: int = Field(2, ge=0, description="K, the first layer without the dropped tokens; 0 = random tokens")
        keep: Amount = Field(0.5, description=KEPT)
        query: str = Field("mask_query", description=QUERY)
        query_reduce: QueryReduce = Field("mean", description=QUERY_REDUCE)
        positions: Positions = Field("keep", description=POSITIONS)
        seed: int = Field(0, description="random seed if layer = 0")

    options: Options

    def without_effect(self) -> dict[str, str]:
        drawn = "with layer=0, where tokens are random"
        return {"seed": "unless layer=0"} if self.options.layer else {"query": drawn, "query_reduce": drawn}

    @property
    def reads(self) -> tuple[AttentionFrom, ...]:
        return (AttentionFrom(self.options.query, self.options.query_reduce),) if self.options.layer else ()

    def score(self, stage: Stage, tokens: Tokens) -> Tensor:
        # attention of layer K−1, softmax over all keys, mean over heads; for K = 0 random, as in the authors' code
        return tokens.attention if stage.layer else random_scores(tokens, self.options.seed)
