"""A simple, strong reference (ours): keep tokens with dissimilar states in a decoder layer."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import Field

from tokenprune import Decision, HiddenStates, Keep, Shape, Stage, Strategy, StrategyOptions, Tokens
from tokenprune.core.options import KEPT, POSITIONS, Amount, layer_of, tokens_of
from tokenprune.core.stage import Positions
from tokenprune_strategies.ops.farthest_point import farthest_first
from tokenprune_strategies.ops.stacked_images import StackedImages


class Similarity(Strategy):
    """Keep the image tokens whose hidden states are most dissimilar on entering a layer (ours).

    Farthest-first on 1 − cosine similarity, as DivPrune (https://arxiv.org/abs/2503.02175) on the projector's output,
    but after the decoder's first layers. Images are independent.
    """

    name = "similarity"
    budget_option = "keep"
    budget_layer = ("layer", 0)

    class Options(StrategyOptions):
        """Options of `similarity`."""

        layer: int = Field(2, ge=0, description="the first layer without the dropped tokens")
        keep: Amount = Field(0.5, description=KEPT)
        positions: Positions = Field("keep", description=POSITIONS)

    options: Options

    def stages(self, shape: Shape) -> Iterable[Stage]:
        """One stage. Raises OptionError if the model has no such layer."""
        layer = layer_of(self.options.layer, shape.layers, self.name)
        yield Stage("select", layer, tokens_of(self.options.keep, shape.image_tokens), (HiddenStates(),))

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        """Pick farthest-first in each image."""
        images = StackedImages.of(tokens)
        picks = farthest_first(images.take(tokens.hidden), images.exists, images.quotas)
        return Keep.where(images.mask(picks, tokens))
