"""A simple, strong reference (ours): keep what is unlike each other, by the states of a decoder layer."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import Field

from tokenprune.core.decisions import Decision, Keep
from tokenprune.core.options import Amount, tokens_of
from tokenprune.core.reads import HiddenStates
from tokenprune.core.stage import Shape, Stage
from tokenprune.core.strategy import Strategy, StrategyOptions
from tokenprune.core.tokens import Tokens
from tokenprune.errors import OptionError
from tokenprune_strategies.ops.farthest_point import farthest_first, image_groups, picked


class Similarity(Strategy):
    """Keep the image tokens whose hidden states are most unlike each other, on entering a layer (ours).

    Farthest-first on 1 − cosine similarity, the selection that DivPrune (arXiv 2503.02175) makes on the projector's
    output; here the tokens have been through the decoder's first layers. Every image chooses for itself, positions
    are kept.
    """

    name = "similarity"
    budget_option = "keep"
    budget_layer = ("layer", 0)

    class Options(StrategyOptions):
        """Options of `similarity`."""

        layer: int = Field(2, ge=0, description="the first layer without the dropped tokens")
        keep: Amount = Field(0.5, description="image tokens kept: an int counts them, a float is a share")

    options: Options

    def stages(self, shape: Shape) -> Iterable[Stage]:
        """One stage. Raises OptionError where the model has no such layer."""
        layer = self.options.layer
        if layer >= shape.layers:
            raise OptionError(
                f"strategy 'similarity': option 'layer': found {layer}, but the model has {shape.layers} layers; "
                f"choose one of 0 … {shape.layers - 1}"
            )
        yield Stage("select", layer, tokens_of(self.options.keep, shape.image_tokens), (HiddenStates(),))

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        """Pick farthest-first in every image."""
        rows, index, shares = image_groups(tokens)
        picks = farthest_first(tokens.hidden[rows[:, None], index.clamp(min=0)], index >= 0, shares)
        return Keep.where(picked(tokens, rows, index, picks))
