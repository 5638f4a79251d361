"""DivPrune (Alvar et al., "Diversity-based Visual Token Pruning for Large Multimodal Models", arXiv 2503.02175)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tokenprune.core.decisions import Decision, Keep, Merge
from tokenprune.core.options import Amount, tokens_of
from tokenprune.core.reads import HiddenStates
from tokenprune.core.stage import Positions, Shape, Stage
from tokenprune.core.strategy import Strategy, StrategyOptions
from tokenprune.core.tokens import Tokens
from tokenprune.errors import OptionError
from tokenprune_strategies.ops.farthest_point import farthest_first, image_groups, picked


class DivPrune(Strategy):
    """Keep the image tokens that are most unlike each other, before the first decoder layer.

    A max-min diversity problem, solved greedily on 1 − cosine similarity of the tokens as they enter the decoder: first
    the token farthest from its nearest neighbour, then always the one farthest from its nearest pick. No text, no
    attention. The share is rounded to the nearest number (half to even).

    Ours: every batch row and every image chooses for itself (the authors' code takes row 0's choice for all), and no
    token is picked twice, which the authors' code does where rows are exact copies of each other (`faithful`).
    """

    name = "divprune"
    budget_option = "keep"

    class Options(StrategyOptions):
        """Options of DivPrune."""

        keep: Amount = Field(0.098, description="image tokens kept: an int counts them, a float is a share")
        faithful: bool = Field(
            False, description="pick copies again as the authors' code does, so that one token may enter several times"
        )
        positions: Positions = Field(
            "renumber", description="renumber: compact, as the authors do; keep: kept tokens stay at their own places"
        )

    options: Options

    def __init__(self, *, budget: float | None = None, **options: Any) -> None:
        """Raises OptionError or BudgetError, see Strategy."""
        super().__init__(budget=budget, **options)
        self.positions = self.options.positions
        if self.options.faithful and self.positions == "keep":
            raise OptionError(
                "strategy 'divprune': options 'faithful' and positions='keep' found, but a token that enters twice has "
                "no second place of its own; use one of them"
            )

    def stages(self, shape: Shape) -> Iterable[Stage]:
        """One stage before the first layer."""
        yield Stage("select", 0, self.kept(shape.image_tokens), (HiddenStates(),))

    def kept(self, total: int) -> int:
        """How many of `total` tokens `keep` means."""
        keep = self.options.keep
        return tokens_of(max(1, round(keep * total)) if isinstance(keep, float) else keep, total)

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        """Pick farthest-first in every image."""
        rows, index, shares = image_groups(tokens)
        states = tokens.hidden[rows[:, None], index.clamp(min=0)]
        picks = farthest_first(states, index >= 0, shares, repeats=self.options.faithful)
        if self.options.faithful:
            return self._copies(tokens, rows, index, picks)
        return Keep.where(picked(tokens, rows, index, picks))

    def _copies(self, tokens: Tokens, rows: Tensor, index: Tensor, picks: Tensor) -> Decision:
        """Every image's picks, repeated ones as copies, at its first slots."""
        slots: list[list[Tensor]] = [[index.new_zeros(0)] for _ in range(len(tokens.exists))]
        origins: list[list[Tensor]] = [[index.new_zeros(0)] for _ in range(len(tokens.exists))]
        for row, members, numbers in zip(rows.tolist(), index, picks, strict=True):
            ordered = members[numbers[numbers >= 0]].sort().values
            slots[row].append(members[: len(ordered)])
            origins[row].append(ordered)
        where, origin = (
            pad_sequence([torch.cat(part) for part in parts], batch_first=True, padding_value=-1)
            for parts in (slots, origins)
        )
        weights = torch.nn.functional.one_hot(origin.clamp(min=0), tokens.exists.shape[1]).float()
        return Merge(where, weights=weights, origin=origin)
