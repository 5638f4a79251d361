"""Baselines of every comparison: no pruning, random tokens, a regular grid, and no image tokens."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import Field

from tokenprune import Decision, Keep, Shape, Stage, Strategy, StrategyOptions, Tokens
from tokenprune.core.options import KEPT, POSITIONS, Amount, tokens_of
from tokenprune.core.stage import Positions
from tokenprune_strategies.ops.even_and_random import grid_mask, random_scores


class NoPruning(Strategy):
    """No pruning: without stages, every layer runs on every image token."""

    name = "none"

    def stages(self, shape: Shape) -> Iterable[Stage]:
        """No stages."""
        return ()

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        """Keep everything (never called, since there are no stages)."""
        return Keep.where(tokens.active)


class Blind(Strategy):
    """No image token enters the decoder, so the model sees only the text: the lower bound of a comparison."""

    name = "blind"

    def stages(self, shape: Shape) -> Iterable[Stage]:
        """One stage before the first layer, with no tokens."""
        yield Stage("blind", layer=0, tokens=0)

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        """Keep nothing."""
        return Keep.where(tokens.active & False)


class FixedShare(Strategy):
    """Base of the baselines that keep `keep` tokens before the first layer."""

    budget_option = "keep"

    class Options(StrategyOptions):
        """Options of these baselines."""

        keep: Amount = Field(0.25, description=KEPT)
        positions: Positions = Field("keep", description=POSITIONS)

    options: Options

    def stages(self, shape: Shape) -> Iterable[Stage]:
        """One stage before the first layer."""
        yield Stage(self.name, layer=0, tokens=tokens_of(self.options.keep, shape.image_tokens))


class Random(FixedShare):
    """Random image tokens; every subset of that size is equally likely."""

    name = "random"

    class Options(FixedShare.Options):
        """Options of `random`."""

        seed: int = Field(0, description="random seed; the draw of a batch row does not depend on other rows")

    options: Options

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        """Keep the tokens of the highest draws."""
        return Keep.top(random_scores(tokens, self.options.seed), tokens.target)


class Uniform(FixedShare):
    """Image tokens spaced evenly over the grid: evenly spaced rows, evenly spaced cells in each (ours)."""

    name = "uniform"

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        """Keep the cells of the coarser grid."""
        return Keep.where(grid_mask(tokens))
