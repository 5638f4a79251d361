"""DART (Wen et al., "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More",
https://arxiv.org/abs/2502.11494)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from tokenprune import Decision, Keep, Shape, Stage, Strategy, StrategyOptions, Tokens
from tokenprune.core.budget import Ladder, ladders
from tokenprune.core.options import KEPT, POSITIONS, Amount, layer_of, tokens_of
from tokenprune.core.reads import Embeddings, HiddenStates, LayerKeys, TextEmbeddings, TextKeys, TextStates
from tokenprune.core.stage import Positions
from tokenprune.errors import BudgetError


class DART(Strategy):
    """Keep the image tokens that are least similar to a few pivots: duplicates are dropped, important or not.

    Pivots are the image and text tokens whose keys have the largest norm (section 4).

    Ours: the pivots choose in the order of their norm, those of the image first; `keep` includes the image pivots, and
    if it does not divide evenly the first pivots keep one more; batch rows and images are independent.
    """

    name = "dart"
    budget_option = "keep"
    budget_layer = ("layer", 1)

    class Options(StrategyOptions):
        """Options of DART."""

        layer: int = Field(
            2,
            ge=0,
            description="K, the first layer without the dropped tokens; 0: embeddings are keys and states",
        )
        keep: Amount = Field(0.222, description=KEPT)
        image_pivots: int = Field(4, ge=1, description="pivots among the tokens of each image")
        text_pivots: int = Field(4, ge=0, description="pivots among the text tokens after the image")
        positions: Positions = Field("keep", description=POSITIONS)
        faithful: bool = Field(
            False,
            description="as in the authors' code: `keep` does not include image pivots, all pivots keep the same "
            "number, in the iteration order of a Python set of their positions",
        )

    options: Options

    def stages(self, shape: Shape) -> Iterable[Stage]:
        """One stage at layer K. Raises OptionError without such a layer, BudgetError for fewer tokens than pivots."""
        layer = layer_of(self.options.layer, shape.layers, self.name)
        inside = (LayerKeys(), TextKeys(), HiddenStates(normed=True), TextStates(normed=True))
        reads = inside if layer else (Embeddings(), TextEmbeddings())
        yield Stage("prune", layer, self.kept(tokens_of(self.options.keep, shape.image_tokens), shape), reads)

    def kept(self, keep: int, shape: Shape) -> int:
        """Image tokens that remain in a row. Raises BudgetError if they are fewer than the image pivots."""
        pivots, total = min(self.options.image_pivots, shape.image_tokens), shape.image_tokens
        if self.options.faithful:
            chosen = pivots + self.options.text_pivots
            return pivots + chosen * (min(keep, total - pivots) // chosen)
        if keep < pivots:
            raise BudgetError(
                f"strategy 'dart' keeps at least its {pivots} image pivots; found keep={keep} of {total} image tokens; "
                "raise 'keep' or the budget, or lower 'image_pivots'"
            )
        return keep

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        """Select, image by image."""
        chosen = torch.zeros_like(tokens.exists)
        embedded = (tokens.embeddings, tokens.text_embeddings) if stage.layer == 0 else None  # as deployed runtimes do
        both = embedded or (tokens.layer_keys, tokens.text_keys)
        norms, text_norms = (keys.float().abs().sum(-1) for keys in both)
        both = embedded or (tokens.hidden, tokens.text_hidden)
        states, text_states = (normalize(x.float(), dim=-1) for x in both)
        for image in tokens.images():
            row, index = image.row, image.index
            # (1) pivots: the image tokens, and the text tokens after the image, whose keys in layer K−1 have the
            # largest L1 norm (after the rotary embedding, all heads); an image with a small quota has fewer
            largest = _largest(norms[row, index], min(self.options.image_pivots, image.quota))
            pivots = index[largest]
            # on the host, which knows where the text is: a device would have to be waited for
            text = (tokens.on_host("images_before")[row] > image.index_on_host[-1]).nonzero().flatten()
            text = text.to(tokens.device, non_blocking=True)
            text = text[_largest(text_norms[row, text], self.options.text_pivots)]
            # (2) cosine similarity of each pivot and each image token, of states after the decoder's final norm
            likeness = torch.cat((states[row, pivots], text_states[row, text])) @ states[row, index].T
            if self.options.faithful:  # the authors' pivots choose in CPython's iteration order of a set
                places = torch.cat((tokens.places[row, pivots], tokens.text_places[row, text])).tolist()
                likeness = likeness[[places.index(place) for place in set(places)]]
            # (3) keep the image pivots, and the least similar tokens of each pivot
            taken = torch.zeros_like(index, dtype=torch.bool).index_fill_(0, largest, True)
            chosen[row, index] = _least_like(likeness, taken, image.quota - len(pivots))
        return Keep.where(chosen)

    def budget_ladders(self, shape: Shape) -> Iterable[Ladder]:
        """The largest `keep` that meets the budget; if it is less than the pivots, `layer` moves down to 1 (ours).

        If it is still less, there are fewer image pivots.
        """
        total, given = shape.image_tokens, "image_pivots" in self.options.model_fields_set
        most = min(self.options.image_pivots, total)
        for pivots in range(most, most - 1 if given else 0, -1):
            least = 1 if self.options.faithful else pivots  # in the authors' code `keep` does not count the pivots
            for ladder in ladders(self, shape):
                enough = [setting for setting in ladder if tokens_of(setting["keep"], total) >= least]
                yield [{**setting, "image_pivots": pivots} for setting in enough]


def _largest(norms: Tensor, count: int) -> Tensor:
    """The `count` largest of float [n], in descending order."""
    return norms.argsort(descending=True, stable=True)[:count]


def _least_like(likeness: Tensor, taken: Tensor, count: int) -> Tensor:
    """bool [n]: the tokens in `taken` and `count` others, which the pivots keep one after the other.

    Args:
        likeness: float [pivots, n], cosine similarity.
        taken: bool [n], the image pivots.
        count: number of other tokens.
    """
    each, more = divmod(count, max(1, len(likeness)))
    for turn, similar in enumerate(likeness):
        # taken tokens sort last: each pivot keeps the least similar of the remaining ones
        order = similar.masked_fill(taken, float("inf")).argsort(stable=True)
        taken = taken.scatter(0, order[: each + (turn < more)], True)
    return taken
