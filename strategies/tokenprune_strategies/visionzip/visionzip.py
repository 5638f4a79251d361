"""VisionZip (Yang et al., "Longer is Better but Not Necessary in Vision Language Models", arXiv 2412.04467)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tokenprune.core.decisions import Decision, Merge
from tokenprune.core.options import Amount, tokens_of
from tokenprune.core.reads import ClsAttention, ClsFeatures, Projector, TowerFeatures, TowerKeys
from tokenprune.core.stage import Positions, Shape, Stage
from tokenprune.core.strategy import Strategy, StrategyOptions
from tokenprune.core.tokens import Tokens
from tokenprune_strategies.ops.allocation import apportion
from tokenprune_strategies.ops.crops import crop_reads, crops_of
from tokenprune_strategies.visionzip.contextual import line_up, zip_crop


class VisionZip(Strategy):
    """Keep [CLS] and the image tokens that it attends to most in the vision tower; merge the others into a few.

    All of it happens in every crop of an image, before the projector (section 3): (1) dominant tokens: [CLS] and those
    of highest [CLS] attention in the last layer but one, in image order; (2) contextual tokens: of the rest, every
    step-th is a target, and every other one joins the target whose key is most like its own; a target is passed on as
    its own row plus the mean of those that joined it. The decoder gets dominant tokens, then contextual ones. Of an
    image in several crops it gets the dominant patches of all crops in image order, then their [CLS], then contextual.

    Ours: a row's tokens are shared by the size of crops, and a crop that keeps all its tokens is left as it is.
    """

    name = "visionzip"
    budget_option = "keep"

    class Options(StrategyOptions):
        """Options of VisionZip."""

        keep: Amount = Field(0.112, description="tokens left in a row, [CLS] included: an int or a share of them all")
        contextual: Annotated[int | float, Field(ge=0)] = Field(
            10 / 64, description="contextual ones among them: an int counts those of a row, a float is a share of keep"
        )
        positions: Positions = Field(
            "renumber", description="renumber: compact, as the authors do; keep: kept tokens stay at their own places"
        )

    options: Options

    def __init__(self, *, budget: float | None = None, **options: Any) -> None:
        """Raises OptionError or BudgetError, see Strategy."""
        super().__init__(budget=budget, **options)
        self.positions = self.options.positions

    def stages(self, shape: Shape) -> Iterable[Stage]:
        """One stage before the first layer."""
        reads = (ClsAttention(-2), TowerKeys(-2, "mean"), TowerFeatures(), ClsFeatures(), Projector())
        yield Stage("zip", 0, tokens_of(self.options.keep, shape.image_tokens), (*reads, *crop_reads(shape)))

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        """Select and merge, crop by crop."""
        rows = [self._row(row, stage, tokens) for row in range(len(tokens.exists))]
        slots, origin, whole = (
            pad_sequence([row[i] for row in rows], batch_first=True, padding_value=-1) for i in (0, 1, 2)
        )
        weights = pad_sequence([row[3] for row in rows], batch_first=True)
        features = tokens.features.masked_fill(~tokens.exists[..., None], 0)
        patches = weights @ features.float()
        cls = tokens.cls_features.gather(1, whole.clamp(min=0)[..., None].expand_as(patches)).float()
        values = tokens.project(torch.where((whole >= 0)[..., None], cls, patches).to(features.dtype))
        scores = tokens.cls_attention.masked_fill(~tokens.exists, float("-inf"))
        return Merge(slots, values=values, scores=scores, weights=weights, origin=origin)

    def _row(self, row: int, stage: Stage, tokens: Tokens) -> tuple[Tensor, ...]:
        """The new tokens of a batch row, as `line_up` gives them."""
        images, size = crops_of(stage, tokens, row), tokens.exists.shape[1]
        shares = apportion(int(tokens.target[row]), [len(crop) for crops in images for crop in crops])
        counts = iter(zip(shares, self.contextual(shares), strict=True))
        attention, keys = tokens.cls_attention[row], tokens.keys[row]
        empty = tokens.image.new_zeros(0)
        parts = [(empty, empty, empty, attention.new_zeros(0, size))]
        for crops in images:
            zipped = [zip_crop(attention[crop], keys[crop], *next(counts)) for crop in crops]
            parts.append(line_up(crops, zipped, size, self.positions))
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    def contextual(self, shares: Sequence[int]) -> list[int]:
        """How many tokens of each crop's share are contextual; at least one is left to [CLS]."""
        wanted = self.options.contextual
        counts = apportion(wanted, shares) if isinstance(wanted, int) else [int(n * wanted + 0.5) for n in shares]
        return [min(count, max(0, share - 1)) for count, share in zip(counts, shares, strict=True)]
