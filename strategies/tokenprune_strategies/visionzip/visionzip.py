"""VisionZip (Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models",
https://arxiv.org/abs/2412.04467)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Annotated

from pydantic import Field

from tokenprune import Decision, Merge, Shape, Stage, Strategy, StrategyOptions, Tokens
from tokenprune.core.apportion import apportion
from tokenprune.core.options import COMPACT, Amount, tokens_of
from tokenprune.core.reads import ClsAttention, ClsFeatures, Crops, Projector, TowerFeatures, TowerKeys
from tokenprune.core.stage import Positions
from tokenprune_strategies.ops.before_projector import projected
from tokenprune_strategies.visionzip.contextual import new_tokens, zip_crop


class VisionZip(Strategy):
    """Keep [CLS] and the image tokens that it attends to most in the vision tower; merge the others into a few.

    All steps are within each crop of an image, before the projector (section 3).

    Ours: a row's tokens are divided over its crops in proportion to their size, and a crop that keeps all its tokens is
    unchanged.
    """

    name = "visionzip"
    budget_option = "keep"

    class Options(StrategyOptions):
        """Options of VisionZip."""

        keep: Amount = Field(
            0.112, description="tokens that remain in a row, [CLS] included: number (int) or share (float)"
        )
        contextual: Annotated[int | float, Field(ge=0)] = Field(
            10 / 64, description="contextual tokens among them: number in a row (int) or share of keep (float)"
        )
        positions: Positions = Field("renumber", description=COMPACT)

    options: Options

    def stages(self, shape: Shape) -> Iterable[Stage]:
        """One stage before the first layer."""
        # attention and keys of the second-to-last tower layer, whose output is the projector's input
        reads = (ClsAttention(-2), TowerKeys(-2, "mean"), TowerFeatures(), ClsFeatures(), Projector())
        yield Stage("zip", 0, tokens_of(self.options.keep, shape.image_tokens), (*reads, *shape.offered(Crops())))

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        """Select and merge, crop by crop."""
        groups, cls = [], []
        for row, crops in enumerate(tokens.images_by_row()):
            attention, keys = tokens.cls_attention[row], tokens.keys[row]
            zipped = [
                zip_crop(crop, attention[crop.index], keys[crop.index], contextual)
                for crop, contextual in zip(crops, self.contextual([crop.quota for crop in crops]), strict=True)
            ]
            parts = groupby(zipped, key=lambda one: one.crop.image)
            groups += [new_tokens(list(image), self.positions) for _, image in parts]
            cls += [(row, int(one.crop.index_on_host[0])) for one in zipped if one.cls]
        scores = tokens.cls_attention.masked_fill(~tokens.exists, float("-inf"))
        return projected(Merge.from_groups(tokens, groups, scores=scores), tokens, cls)

    def contextual(self, shares: Sequence[int]) -> list[int]:
        """Number of contextual tokens in each crop's share; at least one token remains for [CLS]."""
        wanted = self.options.contextual
        counts = apportion(wanted, shares) if isinstance(wanted, int) else [int(n * wanted + 0.5) for n in shares]
        return [min(count, max(0, share - 1)) for count, share in zip(counts, shares, strict=True)]
