"""IVC-Prune (Sun et al., "IVC-Prune: Revealing the Implicit Visual Coordinates in LVLMs for Vision Token Pruning",
https://arxiv.org/abs/2602.03060)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from tokenprune import Decision, Keep, Shape, Stage, Strategy, StrategyOptions, Tokens
from tokenprune.core.budget import Ladder
from tokenprune.core.options import KEPT, POSITIONS, Amount, Depth, layer_of, tokens_of
from tokenprune.core.reads import LayerValues, RotaryTables, TextValues
from tokenprune.core.stage import Positions
from tokenprune_strategies.ivcprune.numbers import layers_and_counts
from tokenprune_strategies.ivcprune.scores import coordinate_means, text_after, value_scores
from tokenprune_strategies.ivcprune.selection import selected
from tokenprune_strategies.ops.authors_grid import check_no_budget


class IVCPrune(Strategy):
    """Keep image tokens whose positions serve as coordinates, since the rotary embedding is nearly the identity or a
    quarter turn there, and those whose values resemble the text's. The caches of earlier layers lose the others too.

    Ours: any number of tokens (see `faithful`); the text where none follows the image; layers are fractions of the
    depth; batch rows and images are independent (the authors prune the first image of a row).
    """

    name = "ivcprune"
    budget_option = "keep"

    class Options(StrategyOptions):
        layer: Depth = Field(0.5, description="k, first layer without the others: layer (int) or share of the depth")
        keep: Amount = Field(0.5, description=KEPT)
        variant: Literal["qwen", "llava"] = Field(
            "qwen", description="softmax of the values' similarity over tokens of the image (qwen), or all (llava)"
        )
        coordinates: Annotated[float, Field(ge=0, le=0.5)] | None = Field(
            None, description="share of the tokens by cos, and by sin, of positions; None = 0.1 (qwen), 0.05 (llava)"
        )
        positions: Positions = Field("keep", description=POSITIONS)
        faithful: bool = Field(
            False,
            description="as in the authors' code for Qwen2.5-VL or LLaVA: all coordinates and seeds stay; with llava "
            "the number of tokens depends on the image alone, and the cache of layer 0 stays whole",
        )

    options: Options

    def __init__(self, *, budget: float | None = None, **options: Any) -> None:
        """Raises OptionError or BudgetError, see Strategy."""
        super().__init__(budget=budget, **options)
        check_no_budget(self.name, self.options.faithful, budget)

    def without_effect(self) -> Mapping[str, str]:
        return {"keep": "with faithful=True and variant=llava"} if self.as_llava else {}

    @property
    def as_llava(self) -> bool:
        """Whether it is the authors' code for LLaVA."""
        return self.options.faithful and self.options.variant == "llava"

    def stages(self, shape: Shape) -> Iterable[Stage]:
        """One stage at layer k. Raises OptionError without such a layer."""
        count = None if self.options.faithful else tokens_of(self.options.keep, shape.image_tokens)
        reads = (LayerValues(heads="each"), TextValues(heads="each"), RotaryTables())
        layer, first = layer_of(self.options.layer, shape.layers, self.name, least=1), int(self.as_llava)
        caches: dict[str, Any] = {"prune_earlier_caches": True, "caches_from": first} if first < layer else {}
        yield Stage("prune", layer, count, reads, **caches)

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        """Select tokens of each image."""
        mask, scores = torch.zeros_like(tokens.exists), torch.full_like(tokens.mass, float("-inf"))
        means = coordinate_means(tokens.rotary_tables)
        for image in tokens.images():
            # (1) seeds: tokens whose values are most similar to those of the text; (2) scores: similarity to both
            text = text_after(tokens, image, faithful=self.options.faithful)
            found = value_scores(tokens, image, text, among_all=self.options.variant == "llava")
            # (3) coordinates: tokens with the largest mean of cos, or of sin, in the rotary embedding; (4) both come
            # before tokens of high score
            kept = selected(self.options, image.quota, found, means[image.row, image.index])
            mask[image.row, image.index], scores[image.row, image.index] = kept, found.scores
        return Keep.where(mask, scores=scores)

    def budget_ladders(self, shape: Shape) -> Iterable[Ladder]:
        """The largest `keep`; if seeds and coordinates would not fit into it, `layer` moves down to 1 first (ours)."""
        return layers_and_counts(self.options, shape)
