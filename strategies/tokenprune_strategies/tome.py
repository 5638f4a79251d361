"""ToMe (Bolya et al., "Token Merging: Your ViT But Faster", https://arxiv.org/abs/2210.09461), inside the decoder."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field

from tokenprune import Decision, Merge, Shape, Stage, Strategy, StrategyOptions, Tokens
from tokenprune.core.layout import true_positions
from tokenprune.core.options import Amount, tokens_of
from tokenprune.core.reads import HiddenStates, LayerKeys, Projector, Read, TowerFeatures, TowerKeys
from tokenprune.core.scheduling.state import as_mask
from tokenprune.core.stage import Positions
from tokenprune.errors import OptionError
from tokenprune_strategies.ops.bipartite_matching import bipartite_merge, merged_means


def _ascending(layers: tuple[int, ...]) -> tuple[int, ...]:
    if not layers or min(layers) < 0 or any(b <= a for a, b in itertools.pairwise(layers)):
        raise ValueError("expected one or more layers, each later than the one before")
    return layers


class ToMe(Strategy):
    """Merge the most similar image tokens; averages are weighted by the number of original tokens in each.

    ToMe does one round of bipartite matching in every layer of a vision transformer. Here (ours) rounds are repeated on
    entering decoder layers, or between tower and projector, until the stage's number of tokens is reached; each of
    `layers` removes the same number.

    Ours: the merged token takes B's slot and position, images are merged independently (unless fewer tokens than images
    remain), and attention is unchanged (ToMe adds the logarithm of the sizes to it).
    """

    name = "tome"
    budget_option = "keep"

    class Options(StrategyOptions):
        """Options of `tome`."""

        where: Literal["decoder", "tower"] = Field(
            "decoder", description="decoder (states between layers) or tower (features before the projector)"
        )
        layers: Annotated[tuple[int, ...], AfterValidator(_ascending)] = Field(
            (2,), description="with where=decoder: the layers that begin with a merge"
        )
        keep: Amount = Field(0.5, description="image tokens after the last merge: number (int) or share (float)")
        match: Literal["keys", "states"] = Field(
            "keys", description="compared vectors: keys (of the previous or the tower's last layer) or states"
        )
        per_round: float = Field(
            0.25, gt=0, le=0.5, description="largest share of the tokens that a round merges; 0.5 = all of A"
        )
        positions: Positions = Field("keep", description="position policy of merged tokens: keep or renumber")

    options: Options

    def __init__(self, *, budget: float | None = None, **options: Any) -> None:
        """Raises OptionError or BudgetError, see Strategy."""
        super().__init__(budget=budget, **options)
        self.budget_layer = ("layers", 1) if self.options.where == "decoder" else None

    def without_effect(self) -> Mapping[str, str]:
        """See `Strategy.without_effect`."""
        return {"layers": "with where=tower"} if self.options.where == "tower" else {}

    def stages(self, shape: Shape) -> Iterable[Stage]:
        """One stage per merge. Raises OptionError if the model has no such layer, or no layer with keys before it."""
        total, keep = shape.image_tokens, tokens_of(self.options.keep, shape.image_tokens)
        keys, layers = self.options.match == "keys", self.options.layers
        if self.options.where == "tower":
            reads: tuple[Read, ...] = (TowerKeys(heads="mean"),) if keys else ()
            yield Stage("merge", 0, keep, (TowerFeatures(), Projector(), *reads))
            return
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
        into = torch.arange(states.shape[1], device=tokens.device).repeat(len(states), 1)  # initially, none is merged
        for row, images in enumerate(tokens.images_by_row(least=1)):
            parts = [(image.index, image.quota) for image in images]
            target = sum(share for _, share in parts)
            if images and target < len(images):  # fewer tokens than images: merge across images
                parts = [(torch.cat([index for index, _ in parts]), target)]
            for index, share in parts:
                merged = bipartite_merge(metric[row, index], tokens.mass[row, index], share, self.options.per_round)
                into[row, index] = index[merged]
        # keep the targets of merges, which include unmerged tokens; −1 = inactive
        index = true_positions(as_mask(torch.where(tokens.active, into, -1), into.shape[1]))
        values = merged_means(states, tokens.mass.masked_fill(~tokens.active, 0), into, index)
        weights = (into[:, None] == index[..., None]) & tokens.active[:, None]  # one target each, so mass is conserved
        if tower:
            values = tokens.project(values)
        return Merge(index, values=values, weights=weights.float(), conserves_mass=True)
