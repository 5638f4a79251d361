"""Key norms, the last step of ViTCoP (Luo et al., "ViTCoP: Accelerating Large Vision-Language Models via Visual and
Textual Semantic Collaborative Pruning", https://arxiv.org/abs/2601.17818) on its own."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import Field
from torch import Tensor

from tokenprune import ScorerStrategy, Shape, Stage, StrategyOptions, Tokens
from tokenprune.core.options import KEPT, POSITIONS, Amount, layer_of, tokens_of
from tokenprune.core.reads import LayerKeys
from tokenprune.core.stage import Positions


class KNorm(ScorerStrategy):
    """From layer K on, only the image tokens whose keys in layer K−1 have the smallest norm; no attention is needed.

    Ours: a method of its own, without ViTCoP's steps before it; images and batch rows are independent."""

    name = "knorm"
    by_image = True
    budget_layer = ("layer", 1)
    reads = (LayerKeys("mean"),)

    class Options(StrategyOptions):
        """Options of `knorm`."""

        layer: int = Field(2, ge=1, description="K, the first layer without the dropped tokens")
        keep: Amount = Field(0.5, description=KEPT)
        positions: Positions = Field("keep", description=POSITIONS)

    options: Options

    def stages(self, shape: Shape) -> Iterable[Stage]:
        """One stage at layer K. Raises OptionError without such a layer."""
        layer = layer_of(self.options.layer, shape.layers, self.name, least=1)
        yield Stage("prune", layer, tokens_of(self.options.keep, shape.image_tokens), self.reads)

    def score(self, stage: Stage, tokens: Tokens) -> Tensor:
        """L2 norm of the mean over key heads; the smallest is kept."""
        norms: Tensor = tokens.layer_keys.float().norm(dim=-1)
        return -norms
