"""Baselines of every comparison: no pruning, random tokens, a regular grid, and no image tokens."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import Field

from tokenprune import Decision, Keep, Shape, Stage, Strategy, StrategyOptions, Tokens
from tokenprune.core.options import Amount, tokens_of
from tokenprune_strategies.ops.even_and_random import grid_mask, random_scores


class NoPruning(Strategy):
    """The untouched model: without stages, every layer runs on every image token."""

    name = "none"

    def stages(self, shape: Shape) -> Iterable[Stage]:
        """No stages."""
        return ()

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        """Keep everything (never called: there is no stage)."""
        return Keep.where(tokens.active)


class Blind(Strategy):
    """No image token enters the decoder: what the words alone allow, the lower bound of any comparison."""

    name = "blind"

    def stages(self, shape: Shape) -> Iterable[Stage]:
        """One stage before the first layer, with no tokens."""
        yield Stage("blind", layer=0, tokens=0)

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        """Keep nothing."""
        return Keep.where(tokens.active & False)


class FixedShare(Strategy):
    """Base of the baselines that choose `keep` tokens before the first layer."""

    budget_option = "keep"

    class Options(StrategyOptions):
        """Options of a baseline that keeps a share."""

        keep: Amount = Field(0.25, description="image tokens kept: an int counts them, a float is a share")

    options: Options

    def stages(self, shape: Shape) -> Iterable[Stage]:
        """One stage before the first layer."""
        yield Stage(self.name, layer=0, tokens=tokens_of(self.options.keep, shape.image_tokens))


class Random(FixedShare):
    """Random image tokens; every set of that size is equally likely."""

    name = "random"

    class Options(FixedShare.Options):
        """Options of `random`."""

        seed: int = Field(0, description="seed of the draw; every batch row draws the same as it would alone")

    options: Options

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        """Keep the tokens of the highest draws."""
        return Keep.top(random_scores(tokens, self.options.seed), tokens.target)


class Uniform(FixedShare):
    """Image tokens spread evenly over the grid: evenly spaced grid rows, evenly spaced cells in each (ours)."""

    name = "uniform"

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        """Keep the cells of the coarser grid."""
        return Keep.where(grid_mask(tokens))
