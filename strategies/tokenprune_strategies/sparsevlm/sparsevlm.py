"""SparseVLM and SparseVLM+ (Zhang et al., "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model
Inference", https://arxiv.org/abs/2410.04417).

SparseVLM+ is the second version, as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from tokenprune import AttentionFrom, Decision, HiddenStates, Keep, Merge, PositionKernel, Read, Shape, Stage, Tokens
from tokenprune.core.apportion import top_by_image
from tokenprune.core.options import Amount, tokens_of
from tokenprune.core.stage import Positions
from tokenprune.errors import IncompatibleError
from tokenprune_strategies.ops.even_and_random import random_scores
from tokenprune_strategies.ops.falling_stages import Counts
from tokenprune_strategies.sparsevlm.rated import RatedByText
from tokenprune_strategies.sparsevlm.rating import RATERS, corrected_attention
from tokenprune_strategies.sparsevlm.recycling import Pruning, recycle

HEADS, FLOOR = 14, 0.1


class SparseVLM(RatedByText):
    """Text tokens similar to the image rate the image tokens; low-rated ones are dropped, some are merged into a few.

    Mass is not conserved: a merged token has the average mass of its members, and that of other dropped tokens is lost.

    Ours: layers and counts are shares, to apply the published layers 2, 6, 15 of 32 and counts of 576 to other models;
    ties are not decided by noise (`density_peaks`); if no text token is above average, all rate; batch rows and images
    are independent; with positions="keep" a merged token is at its cluster's centre.
    """

    name = "sparsevlm"
    recycles = True
    tables: ClassVar[dict[int, Counts]] = {
        192: (300, 200, 110),
        128: (303, 110, 36),
        96: (238, 48, 26),
        64: (66, 30, 17),
    }

    class Options(RatedByText.Options):
        """Options of SparseVLM."""

        seed: int = Field(0, description="random seed of the noise in clustering, with faithful")
        faithful: bool = Field(
            False,
            description="as in the authors' code: noise decides ties in clustering, each stage drops a token or more",
        )

    def without_effect(self) -> Mapping[str, str]:
        """See `Strategy.without_effect`."""
        return {**super().without_effect(), **({} if self.options.faithful else {"seed": "unless faithful"})}

    def reads(self) -> tuple[Read, ...]:
        """Attention of the raters, and the states for clustering."""
        return AttentionFrom(RATERS), HiddenStates()

    def pruned(self, stage: Stage, tokens: Tokens) -> Decision:
        """Keep the best, merge the next best."""
        # (1) section 3.2: attention of the raters in the layer before, mean over heads and raters
        scores: Tensor = tokens.attention
        noise = random_scores(tokens, self.options.seed) if self.options.faithful else None
        groups = []
        for row, images in enumerate(tokens.images_by_row()):
            own = tokens.stages[row]  # the numbers differ between rows of different sizes
            assert isinstance(own, Pruning)
            drawn = None if noise is None else noise[row]
            # (2) keep the best, (3) merge the best 0.3 p of the p others into clusters, one for ten (see `cuts`)
            groups += recycle(images, tokens.hidden[row], scores[row], own.cut, self.positions, drawn)
        return Merge.from_groups(tokens, groups, scores=scores)


class SparseVLMPlus(RatedByText):
    """SparseVLM with attention corrected for positions, from the best heads only, without merging.

    Ours: half of the heads (the authors: 14, for any model), and the divisor is at least a tenth of its largest value
    for the rater (it crosses 0 at long distances, where scores would change sign).
    """

    name = "sparsevlm+"
    recycles = False
    tables: ClassVar[dict[int, Counts]] = {
        192: (300, 200, 118),
        128: (238, 108, 60),
        96: (246, 54, 28),
        64: (66, 34, 20),
    }

    class Options(RatedByText.Options):
        """Options of SparseVLM+."""

        positions: Positions = Field(
            "keep", description="position policy at each stage: keep (as in the authors' code) or renumber"
        )
        heads: Amount = Field(0.5, description="attention heads that score: number (int) or share (float)")
        faithful: bool = Field(
            False,
            description="as in the authors' code: 14 heads, a divisor that may be near 0 or negative, each stage drops "
            "at least one token",
        )

    def without_effect(self) -> Mapping[str, str]:
        """See `Strategy.without_effect`."""
        fixed = {"heads": f"with faithful=True, which uses {HEADS} heads"} if self.options.faithful else {}
        return {**super().without_effect(), **fixed}

    def stages(self, shape: Shape) -> Iterable[Stage]:
        """See `RatedByText`. Raises IncompatibleError if the model has too few heads."""
        heads = HEADS if self.options.faithful else self.options.heads
        if isinstance(heads, int) and 0 < shape.heads < heads:
            raise IncompatibleError(
                f"strategy {self.name!r} requires {heads} attention heads, and the model has {shape.heads}; "
                "use faithful=False and set heads= to a share or a smaller number"
            )
        return super().stages(shape)

    def reads(self) -> tuple[Read, ...]:
        """Attention of each rater in each head, and the position kernel."""
        return AttentionFrom(RATERS, reduce="each", heads="each"), PositionKernel(RATERS)

    def pruned(self, stage: Stage, tokens: Tokens) -> Decision:
        """Keep the tokens with the highest scores."""
        floor = 0.0 if self.options.faithful else FLOOR
        # (1) the raters' attention in the layer before, divided by the rotary embedding's own weight at that distance
        attention, rows = corrected_attention(tokens.attention, tokens.position_kernel, tokens.active, floor)
        # (2) heads are ranked by its sum over raters and image tokens
        heads = HEADS if self.options.faithful else tokens_of(self.options.heads, attention.shape[1])
        best = attention.sum((2, 3)).topk(heads, dim=1).indices
        # (3) mean over the best heads, then over raters
        by_token = attention.sum(2).gather(1, best[..., None].expand(-1, -1, attention.shape[3])).mean(1)
        scores = (by_token / rows[:, None]).masked_fill(~tokens.active, float("-inf"))
        return Keep.where(top_by_image(tokens, scores), scores=scores)
