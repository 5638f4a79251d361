"""DivPrune (Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models",
https://arxiv.org/abs/2503.02175)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import Field
from torch import Tensor

from tokenprune import Decision, HiddenStates, Keep, Merge, MergeGroup, Shape, Stage, Strategy, StrategyOptions, Tokens
from tokenprune.core.options import COMPACT, KEPT, Amount, tokens_of
from tokenprune.core.stage import Positions
from tokenprune.errors import OptionError
from tokenprune_strategies.ops.farthest_point import farthest_first
from tokenprune_strategies.ops.stacked_images import StackedImages


class DivPrune(Strategy):
    """Keep the image tokens that are most dissimilar, before the first decoder layer.

    A max-min diversity problem, solved greedily on 1 − cosine similarity of the tokens as they enter the decoder. Uses
    neither text nor attention.

    Ours: batch rows and images are independent (the authors' code uses row 0's choice for all), and no token is picked
    twice, as the authors' code does if rows are exact copies (`faithful`).
    """

    name = "divprune"
    budget_option = "keep"

    class Options(StrategyOptions):
        """Options of DivPrune."""

        keep: Amount = Field(0.098, description=KEPT)
        faithful: bool = Field(
            False, description="as in the authors' code: with duplicate tokens, one token may be picked several times"
        )
        positions: Positions = Field("renumber", description=COMPACT)

    options: Options

    def __init__(self, *, budget: float | None = None, **options: Any) -> None:
        """Raises OptionError or BudgetError, see Strategy."""
        super().__init__(budget=budget, **options)
        if self.options.faithful and self.positions == "keep":
            raise OptionError(
                "strategy 'divprune': options 'faithful' and positions='keep' found, but a token that is picked twice "
                "has only one position; use one of them"
            )

    def stages(self, shape: Shape) -> Iterable[Stage]:
        """One stage before the first layer."""
        keep, total = self.options.keep, shape.image_tokens
        if isinstance(keep, float):  # the authors round to the nearest number, half to even
            keep = max(1, round(keep * total))
        yield Stage("select", 0, tokens_of(keep, total), (HiddenStates(),))

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        """Pick farthest-first in each image."""
        images = StackedImages.of(tokens)
        # the first pick is the token farthest from its nearest neighbour; each next one is the token with the largest
        # distance to its nearest pick (max-min)
        picks = farthest_first(images.take(tokens.hidden), images.exists, images.quotas, repeats=self.options.faithful)
        if not self.options.faithful:
            return Keep.where(images.mask(picks, tokens))
        picked = zip(images.rows.tolist(), images.index, images.picked(picks), strict=True)
        return Merge.from_groups(tokens, [copies(row, index[index >= 0], own) for row, index, own in picked])


def copies(row: int, image: Tensor, picked: Tensor) -> MergeGroup:
    """Picked tokens of an image in image order, at its first slots; a token that was picked twice appears twice."""
    origin = picked.sort().values
    each = (origin[:, None] == image).float()  # each new token consists of one
    return MergeGroup(row, image[: len(origin)], image, each, origin)
