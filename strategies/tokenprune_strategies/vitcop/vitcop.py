"""ViTCoP (Luo et al., "ViTCoP: Accelerating Large Vision-Language Models via Visual and Textual Semantic Collaborative
Pruning", https://arxiv.org/abs/2601.17818)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import Field

from tokenprune import Decision, Keep, LayerKeys, Merge, Shape, Stage, Strategy, StrategyOptions, Tokens, TowerKeys
from tokenprune.core.apportion import top_by_image
from tokenprune.core.budget import Ladder
from tokenprune.core.options import COMPACT, Amount, Depth, tokens_of
from tokenprune.core.reads import ClsAttention, Crops
from tokenprune.core.stage import Positions
from tokenprune.errors import OptionError
from tokenprune_strategies.ops.falling_stages import falling, layers_of
from tokenprune_strategies.vitcop.clusters import selected
from tokenprune_strategies.vitcop.merging import merged
from tokenprune_strategies.vitcop.spending import spending


class ViTCoP(Strategy):
    """Keep the patches that [CLS] attends to most, merge them by clusters at a shallow layer, and keep the tokens with
    the shortest keys at a deep one. Attention weights of the decoder are not needed.

    Ours: grids of any shape, layers as shares of the depth; batch rows, images and crops are independent.
    """

    name = "vitcop"
    budget_option = "keep"

    class Options(StrategyOptions):
        keep: tuple[Amount, Amount, Amount] = Field(
            (0.5, 0.44, 0.089), description="image tokens after tower, merge and last choice: number or share of N each"
        )
        layers: tuple[Depth, Depth] = Field(
            (0.0625, 0.6875), description="layers of merge and last choice: layer (int) or share of the depth (float)"
        )
        clusters: float = Field(0.18, gt=0, le=1, description="clusters, as a share of the tokens after the tower")
        positions: Positions = Field("renumber", description=COMPACT)
        faithful: bool = Field(
            False, description="as in the authors' prefill, where positions become row numbers at the last choice"
        )

    options: Options

    def __init__(self, *, budget: float | None = None, **options: Any) -> None:
        """Raises OptionError or BudgetError, see Strategy."""
        super().__init__(budget=budget, **options)
        if self.options.faithful and self.positions == "keep":
            raise OptionError("strategy 'vitcop': options 'faithful' and positions='keep' found; use one of them")

    def stages(self, shape: Shape) -> Iterable[Stage]:
        """Tower, merge, prune. Raises OptionError for numbers that grow, IncompatibleError for too few layers."""
        first, second, third = falling(self.name, [tokens_of(n, shape.image_tokens) for n in self.options.keep])
        shallow, deep = layers_of(self.options.layers, shape.layers, self.name)
        yield Stage("select", 0, first, (ClsAttention(-2), TowerKeys(-2), *shape.offered(Crops())))
        yield Stage("merge", shallow, second, (LayerKeys("mean"),), positions="keep")
        if self.options.faithful:  # positions become row numbers of the sequence that enters this layer
            yield Stage("number", deep, second, positions="renumber")
        yield Stage("prune", deep, third, (LayerKeys("mean"),), positions="keep")

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        """Select in the tower, merge, select again."""
        if stage.name == "number":
            return Keep.where(tokens.active)
        if stage.name == "select":
            # (1) the patches that [CLS] attends to most, (2) their clusters: density peaks of their keys
            found = selected(tokens, self.options.clusters, faithful=self.options.faithful)
            tokens.memory["labels"] = found.labels
            return Keep.where(found.mask, scores=tokens.cls_attention.masked_fill(~tokens.active, float("-inf")))
        # a token's score is the norm of its key in the layer before, mean over key heads; short keys are good
        norms = tokens.layer_keys.float().norm(dim=-1)
        scores = (-norms).masked_fill(~tokens.active, float("-inf"))
        if stage.name == "prune":
            return Keep.where(top_by_image(tokens, scores), scores=scores)  # (4) the shortest
        # (3) each cluster keeps its shortest, the others of it become one: the middle one plus the mean of all
        groups = merged(tokens, norms, always=self.options.faithful)
        return Merge.from_groups(tokens, groups, scores=scores) if groups else Keep.where(tokens.active, scores=scores)

    def budget_ladders(self, shape: Shape) -> Iterable[Ladder]:
        """See `spending`."""
        return spending(self, shape)
