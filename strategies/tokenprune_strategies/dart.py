"""DART (Wen et al., "Stop Looking for Important Tokens in Multimodal Language Models", arXiv 2502.11494)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from tokenprune.core.budget import Ladder, ladders
from tokenprune.core.decisions import Decision, Keep
from tokenprune.core.options import Amount, tokens_of
from tokenprune.core.reads import HiddenStates, LayerKeys, TextKeys, TextStates
from tokenprune.core.stage import Shape, Stage
from tokenprune.core.strategy import Strategy, StrategyOptions
from tokenprune.core.tokens import Tokens
from tokenprune.errors import BudgetError, OptionError
from tokenprune_strategies.ops.allocation import apportion, present_images


class DART(Strategy):
    """Keep the image tokens least like a few pivots: what is duplicated goes, however important it is.

    On entering layer K (section 4): (1) the image tokens and the text tokens after the image whose keys of layer K−1
    have the largest L1 norm are the pivots; (2) every pivot in turn keeps the image tokens whose states are least
    similar to its own (cosine, after the decoder's final norm), out of those that no pivot has kept; (3) the image
    pivots stay too. Positions are kept.

    Ours: the pivots choose in the order of their norm, those of the image first; `keep` counts all image tokens that
    stay, and where it does not divide evenly the first pivots keep one more; every batch row and image for itself.
    """

    name = "dart"
    budget_option = "keep"
    budget_layer = ("layer", 1)

    class Options(StrategyOptions):
        """Options of DART."""

        layer: int = Field(2, ge=1, description="K, the first layer without the dropped tokens")
        keep: Amount = Field(0.222, description="image tokens kept: an int counts them, a float is a share")
        image_pivots: int = Field(4, ge=1, description="pivots among the image tokens of every image")
        text_pivots: int = Field(4, ge=0, description="pivots among the text tokens after the image")
        faithful: bool = Field(
            False,
            description="as the authors' code: image pivots come on top of `keep`, all pivots keep the same number, in "
            "the order of a Python set of their places",
        )

    options: Options

    def stages(self, shape: Shape) -> Iterable[Stage]:
        """One stage at layer K. Raises OptionError without such a layer, BudgetError for fewer tokens than pivots."""
        layer = self.options.layer
        if layer >= shape.layers:
            raise OptionError(
                f"strategy 'dart': option 'layer': found {layer}, but the model has {shape.layers} layers; "
                f"choose one of 1 … {shape.layers - 1}"
            )
        reads = (LayerKeys(), TextKeys(), HiddenStates(normed=True), TextStates(normed=True))
        yield Stage("prune", layer, self.kept(tokens_of(self.options.keep, shape.image_tokens), shape), reads)

    def kept(self, keep: int, shape: Shape) -> int:
        """Image tokens left of a row. Raises BudgetError for fewer than the image pivots."""
        pivots, total = min(self.options.image_pivots, shape.image_tokens), shape.image_tokens
        if self.options.faithful:
            chosen = pivots + self.options.text_pivots
            return pivots + chosen * (min(keep, total - pivots) // chosen)
        if keep < pivots:
            raise BudgetError(
                f"strategy 'dart' keeps its {pivots} image pivots at least; found keep={keep} of {total} image tokens; "
                "raise 'keep' or the budget, or lower 'image_pivots'"
            )
        return keep

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        """Select, image by image."""
        chosen = torch.zeros_like(tokens.exists)
        norms = tokens.layer_keys.float().abs().sum(-1), tokens.text_keys.float().abs().sum(-1)
        states = normalize(tokens.hidden.float(), dim=-1), normalize(tokens.text_hidden.float(), dim=-1)
        for row, target in enumerate(tokens.target.tolist()):
            images = present_images(tokens, row)
            for image, share in zip(images, apportion(target, [len(image) for image in images]), strict=True):
                after = tokens.text[row] & (tokens.images_before[row] > image[-1])
                text = after.nonzero().flatten()
                text = text[_largest(norms[1][row, text], self.options.text_pivots)]
                pivots = image[_largest(norms[0][row, image], min(self.options.image_pivots, share))]
                likeness = torch.cat((states[0][row, pivots], states[1][row, text])) @ states[0][row, image].T
                if self.options.faithful:
                    places = torch.cat((tokens.places[row, pivots], tokens.text_places[row, text])).tolist()
                    likeness = likeness[[places.index(place) for place in set(places)]]
                taken = torch.isin(image, pivots)
                chosen[row, image[_least_like(likeness, taken, share)]] = True
        return Keep.where(chosen)

    def budget_ladders(self, shape: Shape) -> Iterable[Ladder]:
        """The most tokens that meet the budget; where they are fewer than the pivots, `layer` goes down to 1 (ours).

        Where they still are, fewer image tokens are pivots.
        """
        total, given = shape.image_tokens, "image_pivots" in self.options.model_fields_set
        most = min(self.options.image_pivots, total)
        for pivots in range(most, most - 1 if given else 0, -1):
            least = 1 if self.options.faithful else pivots  # there, `keep` does not count the pivots
            for ladder in ladders(self, shape):
                yield [
                    {**setting, "image_pivots": pivots}
                    for setting in ladder
                    if tokens_of(setting["keep"], total) >= least
                ]


def _largest(norms: Tensor, count: int) -> Tensor:
    """The `count` largest of float [n], falling."""
    return norms.argsort(descending=True, stable=True)[:count]


def _least_like(likeness: Tensor, taken: Tensor, count: int) -> Tensor:
    """bool [n]: the tokens taken already and, up to `count`, those that the pivots keep in turn.

    Args:
        likeness: float [pivots, n], cosine similarity.
        taken: bool [n], the image pivots.
        count: tokens in the end.
    """
    each, more = divmod(count - int(taken.sum()), max(1, len(likeness)))
    for turn, alike in enumerate(likeness):
        order = alike.masked_fill(taken, float("inf")).argsort(stable=True)
        taken = taken.scatter(0, order[: each + (turn < more)], True)
    return taken
