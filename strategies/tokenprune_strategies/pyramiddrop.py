"""PyramidDrop (Xing et al., "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy
Reduction", https://arxiv.org/abs/2410.17247)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from tokenprune import AttentionFrom, ScorerStrategy, Shape, Stage, StrategyOptions, Tokens
from tokenprune.core.budget import Ladder
from tokenprune.core.options import COMPACT, QUERY, QUERY_REDUCE, Amount, Depth, QueryReduce, tokens_of
from tokenprune.core.stage import Positions
from tokenprune.errors import OptionError
from tokenprune_strategies.ops.falling_stages import falling, falling_ladders, layers_of


class PyramidDrop(ScorerStrategy):
    """Keep fewer image tokens at each of several layers: those that the query row attends to most in the next layer.

    Ours: layers are fractions of the depth, to apply the published 8, 16, 24 of 32 to other models; batch rows and
    images are independent (the authors prune the first image of a row).
    """

    name = "pyramiddrop"
    by_image = True

    class Options(StrategyOptions):
        """Options of PyramidDrop."""

        layers: Annotated[tuple[Depth, ...], Field(min_length=1)] = Field(
            (0.25, 0.5, 0.75), description="first layer of each stage: layer (int) or share of the depth (float)"
        )
        keep: tuple[Amount, ...] = Field(
            (0.5, 0.25, 0.125), description="image tokens to keep at each stage: number (int) or share of N (float)"
        )
        query: str = Field("mask_query", description=QUERY)
        query_reduce: QueryReduce = Field("mean", description=QUERY_REDUCE)
        positions: Positions = Field("renumber", description=COMPACT)
        faithful: bool = Field(
            False, description="as in the authors' code: the query is the last row, shares of N are truncated as floats"
        )

    options: Options

    def __init__(self, *, budget: float | None = None, **options: Any) -> None:
        """Raises OptionError or BudgetError, see Strategy."""
        super().__init__(budget=budget, **options)
        if len(self.options.layers) != len(self.options.keep):
            raise OptionError(
                f"strategy {self.name!r}: options 'layers' and 'keep': found {len(self.options.layers)} and "
                f"{len(self.options.keep)} values, expected one of each per stage"
            )

    def without_effect(self) -> Mapping[str, str]:
        """See `Strategy.without_effect`."""
        faithful = dict.fromkeys(("query", "query_reduce"), "with faithful=True, where the query is the last row")
        return faithful if self.options.faithful else {}

    def stages(self, shape: Shape) -> Iterable[Stage]:
        """One stage per layer. Raises OptionError for stages that grow, IncompatibleError for too few layers."""
        query = "last" if self.options.faithful else self.options.query
        # section 3.2: norm, queries, keys and rotation of the next layer
        ahead = AttentionFrom(query, self.options.query_reduce, layer="next")
        layers = layers_of(self.options.layers, shape.layers, self.name)
        for number, (layer, count) in enumerate(zip(layers, self.counts(shape.image_tokens), strict=True), 1):
            yield Stage(f"drop {number}", layer, count, (ahead,))

    def score(self, stage: Stage, tokens: Tokens) -> Tensor:
        """The attention of the next layer, softmax over all keys, mean over heads."""
        attention: Tensor = tokens.attention
        return attention

    def counts(self, total: int) -> tuple[int, ...]:
        """Number of tokens that each stage keeps, of the original `total`."""
        cut = self.options.faithful  # the authors' int(N · ratio) gives 28 for 50 · 0.58
        kept = [int(total * n) if cut and isinstance(n, float) else tokens_of(n, total) for n in self.options.keep]
        return falling(self.name, kept)

    def budget_ladders(self, shape: Shape) -> Iterable[Ladder]:
        """Shares f, f², f³, … of N (published: f = 1/2), with f from the budget (ours).

        If f would be below 1/4, the layers of all stages are scaled down towards layer 1 instead.
        """
        total, steps = shape.image_tokens, range(1, len(self.options.layers) + 1)
        powers = [tuple(max(1, int(total * (n / total) ** k + 1e-6)) for k in steps) for n in range(total, 0, -1)]
        given = [self.counts(total)] if "keep" in self.options.model_fields_set else powers
        return falling_ladders(self, shape, given, least=0.25)
