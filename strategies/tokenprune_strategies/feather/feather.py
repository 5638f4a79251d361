"""FEATHER (Endo et al., "Feather the Throttle: Revisiting Visual Token Pruning for Vision-Language Model Acceleration",
https://arxiv.org/abs/2412.13180)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import torch
from pydantic import Field

from tokenprune import AttentionFrom, Decision, Keep, Shape, Stage, Strategy, StrategyOptions, Tokens
from tokenprune.core.budget import Ladder
from tokenprune.core.options import POSITIONS, QUERY, QUERY_REDUCE, Amount, Depth, QueryReduce
from tokenprune.core.stage import Positions
from tokenprune_strategies.feather.counts import authors_count, candidates, check_stages, counts
from tokenprune_strategies.feather.grid import stride_grid
from tokenprune_strategies.ops.falling_stages import falling_ladders, layers_of


class Feather(Strategy):
    """Drop image tokens at an early and a later layer, by attention without the rotary embedding, which favours the
    end of the image. At the early layer an even grid of tokens stays too, so that no part of the image is lost.

    Ours: the tokens that attention adds are outside the grid, so that their number is known (see `faithful`); layers
    are fractions of the depth; batch rows and images are independent.
    """

    name = "feather"
    budget_option = "keep"

    class Options(StrategyOptions):
        layers: Annotated[tuple[Depth, ...], Field(min_length=1)] = Field(
            (0.25, 0.5), description="first layer of each stage: layer (int) or share of the depth (float)"
        )
        removed: float = Field(0.7, ge=0, lt=1, description="R: attention keeps 1 − R of N, then (1 − R)² of the rest")
        stride: int = Field(
            3, ge=0, description="s, every s-th row and column is in the grid; 0 = no grid, each stage keeps 1 − R"
        )
        keep: tuple[Amount, ...] | None = Field(
            None, description="tokens to keep at each stage, the grid included: number or share of N; overrides removed"
        )
        query: str = Field("mask_query", description=QUERY)
        query_reduce: QueryReduce = Field("mean", description=QUERY_REDUCE)
        positions: Positions = Field("keep", description=POSITIONS)
        faithful: bool = Field(
            False,
            description="as in the authors' code: tokens of the grid count among those that attention keeps, so that "
            "the number depends on the image, numbers are truncated, the image is square, the query is the last row",
        )

    options: Options

    def __init__(self, *, budget: float | None = None, **options: Any) -> None:
        """Raises OptionError or BudgetError, see Strategy."""
        super().__init__(budget=budget, **options)
        check_stages(self.options, budget)

    def without_effect(self) -> Mapping[str, str]:
        if self.options.faithful:
            return dict.fromkeys(("query", "query_reduce", "keep"), "with faithful=True, as in the authors' code")
        fixed = "with keep" if self.options.keep is not None else "with a budget" if self.budget is not None else None
        return {} if fixed is None else {"removed": fixed}

    def stages(self, shape: Shape) -> Iterable[Stage]:
        """One stage per layer. Raises OptionError for stages that grow, IncompatibleError for too few layers."""
        query = "last" if self.options.faithful else self.options.query
        read = AttentionFrom(query, self.options.query_reduce, keys="image", rotary=False)
        layers = layers_of(self.options.layers, shape.layers, self.name)
        for number, (layer, count) in enumerate(zip(layers, counts(self.options, shape.image_tokens), strict=True), 1):
            yield Stage(f"drop {number}", layer, None if self.options.faithful else count, (read,))

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        """Select tokens of each image."""
        images, first, faithful = tokens.images(), stage.name == "drop 1", self.options.faithful
        # (1) unrotated attention of the layer before the stage, softmax over image tokens in each head, mean over heads
        scores, mask = tokens.attention, torch.zeros_like(tokens.exists)
        # (2) at the first stage, the tokens in every s-th row and column
        grid = stride_grid(tokens, images, self.options.stride if first else 0, square=faithful)
        for image in images:
            order = image.index[scores[image.row, image.index].argsort(descending=True, stable=True)]
            if not faithful:  # (3) the grid, and the best of the other tokens
                order = order[(~grid[image.row, order]).int().argsort(stable=True)]
            mask[image.row, order[: authors_count(self.options, len(image), first) if faithful else image.quota]] = True
        return Keep.where(mask | grid if faithful else mask, scores=scores)

    def budget_ladders(self, shape: Shape) -> Iterable[Ladder]:
        """Fewer tokens by attention, at last fewer of the grid; below 1/4 of N, lower layers instead (ours)."""
        given = [counts(self.options, shape.image_tokens)] if self.options.keep is not None else None
        return falling_ladders(self, shape, given or candidates(self.options, shape.image_tokens), least=0.25)
