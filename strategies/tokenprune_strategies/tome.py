"""Token merging by bipartite soft matching (Bolya et al., "Token Merging: Your ViT But Faster", arXiv 2210.09461)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field

from tokenprune.core.decisions import Decision, Merge
from tokenprune.core.layout import true_positions
from tokenprune.core.options import Amount, tokens_of
from tokenprune.core.reads import HiddenStates, LayerKeys, Projector, Read, TowerFeatures, TowerKeys
from tokenprune.core.stage import Positions, Shape, Stage
from tokenprune.core.state import as_mask
from tokenprune.core.strategy import Strategy, StrategyOptions
from tokenprune.core.tokens import Tokens
from tokenprune.errors import OptionError
from tokenprune_strategies.ops.allocation import apportion, images_of
from tokenprune_strategies.ops.bipartite_matching import bipartite_merge, merged_means


def _ascending(layers: tuple[int, ...]) -> tuple[int, ...]:
    if not layers or min(layers) < 0 or any(b <= a for a, b in itertools.pairwise(layers)):
        raise ValueError("expected one or more layers, each later than the one before")
    return layers


class ToMe(Strategy):
    """Merge the image tokens that are most like each other, averaged by the number of tokens that each stands for.

    One round: tokens fall into A and B by turns; each token of A finds its most similar one in B by the cosine of keys,
    averaged over heads; the most similar pairs are merged. ToMe does one in every layer of a vision transformer. Here
    (ours) rounds follow each other at the entry of decoder layers, or between tower and projector, until as many tokens
    are left as the stage declares; as many go at each of `layers`.

    Ours: the merged token takes B's place and position, every image is merged on its own (unless fewer tokens are left
    than there are images), and attention is left as it is (ToMe adds the logarithm of the sizes to it).
    """

    name = "tome"
    budget_option = "keep"

    class Options(StrategyOptions):
        """Options of `tome`."""

        where: Literal["decoder", "tower"] = Field(
            "decoder", description="decoder: the states between layers; tower: its features, before the projector"
        )
        layers: Annotated[tuple[int, ...], AfterValidator(_ascending)] = Field(
            (2,), description="decoder: layers that begin with a merge"
        )
        keep: Amount = Field(0.5, description="image tokens left after the last merge: an int or a share")
        match: Literal["keys", "states"] = Field(
            "keys", description="what is compared: keys, of the layer before or the tower's last, or states"
        )
        per_round: float = Field(
            0.25, gt=0, le=0.5, description="share of the tokens that a round may merge, at most; 0.5 = all of A"
        )
        positions: Positions = Field("keep", description="keep: a merged token stays at its place; renumber: compact")

    options: Options

    def __init__(self, *, budget: float | None = None, **options: Any) -> None:
        """Raises OptionError or BudgetError, see Strategy."""
        super().__init__(budget=budget, **options)
        self.positions = self.options.positions
        self.budget_layer = ("layers", 1) if self.options.where == "decoder" else None

    def without_effect(self) -> Mapping[str, str]:
        """See `Strategy.without_effect`."""
        return {"layers": "with where=tower"} if self.options.where == "tower" else {}

    def stages(self, shape: Shape) -> Iterable[Stage]:
        """One stage a merge. Raises OptionError where the model has no such layer, or no keys before it."""
        total, keep = shape.image_tokens, tokens_of(self.options.keep, shape.image_tokens)
        keys, where = self.options.match == "keys", self.options.where
        if where == "tower":
            reads: tuple[Read, ...] = (TowerKeys(heads="mean"),) if keys else ()
            yield Stage("merge", 0, keep, (TowerFeatures(), Projector(), *reads))
            return
        layers = self.options.layers
        if layers[-1] >= shape.layers or (keys and layers[0] == 0):
            raise OptionError(
                f"strategy 'tome': option 'layers': found {layers} with match={self.options.match!r} on a model of "
                f"{shape.layers} layers; choose among {int(keys)} … {shape.layers - 1}"
            )
        for number, layer in enumerate(layers, 1):
            left = total - number * (total - keep) // len(layers)
            yield Stage(f"merge {number}", layer, left, (HiddenStates(), *((LayerKeys(heads="mean"),) if keys else ())))

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        """Match and merge, image by image."""
        tower = self.options.where == "tower"
        states = tokens.features if tower else tokens.hidden
        metric = states if self.options.match == "states" else tokens.keys if tower else tokens.layer_keys
        into = torch.arange(states.shape[1], device=tokens.device).repeat(len(states), 1)
        for row, target in enumerate(tokens.target.tolist()):
            images = [image[tokens.active[row, image]] for image in images_of(tokens, row)]
            images = images if target >= len(images) else [torch.cat(images)]
            shares = apportion(target, [len(image) for image in images], least=1)
            for image, share in zip(images, shares, strict=True):
                merged = bipartite_merge(metric[row, image], tokens.mass[row, image], share, self.options.per_round)
                into[row, image] = image[merged]
        index = true_positions(as_mask(torch.where(tokens.active, into, -1), into.shape[1]))
        values = merged_means(states, tokens.mass.masked_fill(~tokens.active, 0), into, index)
        weights = (into[:, None] == index[..., None]) & tokens.active[:, None]
        if tower:
            values = tokens.project(values)
        return Merge(index, values=values, weights=weights.float(), conserves_mass=True)
