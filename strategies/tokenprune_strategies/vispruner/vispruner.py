"""VisPruner, earlier FasterVLM (Zhang et al., "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token
Pruning in VLMs", https://arxiv.org/abs/2412.01818)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from tokenprune import Decision, Keep, ScorerStrategy, Shape, Stage, Strategy, StrategyOptions, Tokens
from tokenprune.core.options import COMPACT, KEPT, Amount, tokens_of
from tokenprune.core.reads import ClsAttention, Crops, TowerFeatures
from tokenprune.core.stage import Positions
from tokenprune_strategies.vispruner.duplicates import check_authors_keep, distinct


class VisPruner(Strategy):
    """Keep the image tokens that [CLS] attends to most, and distinct ones of the others, before the decoder.

    Of the others, duplicates are removed round by round: every second token is compared with those between, and the
    most similar ones go.

    Ours: any number of tokens (see `faithful`); batch rows, images and crops are independent, and a row's tokens are
    divided over its crops in proportion to their size.
    """

    name = "vispruner"
    budget_option = "keep"

    class Options(StrategyOptions):
        keep: Amount = Field(0.223, description=KEPT)
        important: float = Field(0.5, ge=0, le=1, description="share of them that is chosen by [CLS] attention")
        faithful: bool = Field(
            False, description="refuse numbers of tokens with which the authors' code stops, or keeps too few"
        )
        positions: Positions = Field("renumber", description=COMPACT)

    options: Options

    def stages(self, shape: Shape) -> Iterable[Stage]:
        """One stage before the first layer."""
        # attention of the second-to-last tower layer, whose output is the projector's input
        reads = (ClsAttention(-2), TowerFeatures(), *shape.offered(Crops()))
        yield Stage("select", 0, tokens_of(self.options.keep, shape.image_tokens), reads)

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        """Select tokens of each crop."""
        mask = torch.zeros_like(tokens.exists)
        for crop in tokens.images():
            # (1) important: T · r of the T tokens, those with the highest [CLS] attention (mean over heads)
            count = int(crop.quota * self.options.important)
            order = tokens.cls_attention[crop.row, crop.index].argsort(descending=True, stable=True)
            important, rest = order[:count], order[count:]
            if self.options.faithful:
                check_authors_keep(crop, len(rest), crop.quota - count)
            # (2) diverse: what remains of the others without duplicates, by cosine similarity of the tower's features
            states = normalize(tokens.features[crop.row, crop.index].float(), dim=-1)
            diverse = distinct(states @ states.T, rest, crop.quota - count)
            # (3) both in image order
            mask[crop.row, crop.index[torch.cat((important, diverse))]] = True
        return Keep.where(mask, scores=tokens.cls_attention.masked_fill(~tokens.active, float("-inf")))


class FasterVLM(ScorerStrategy):
    """Keep the image tokens that [CLS] attends to most, before the decoder: `vispruner` with `important=1`."""

    name = "fastervlm"
    reads = (ClsAttention(-2),)
    by_image = True

    class Options(StrategyOptions):
        keep: Amount = Field(0.223, description=KEPT)
        positions: Positions = Field("renumber", description=COMPACT)

    options: Options

    def stages(self, shape: Shape) -> Iterable[Stage]:
        """One stage before the first layer, which chooses in each crop."""
        for stage in super().stages(shape):
            yield replace(stage, reads=(*stage.reads, *shape.offered(Crops())))

    def score(self, stage: Stage, tokens: Tokens) -> Tensor:
        attention: Tensor = tokens.cls_attention  # of the second-to-last tower layer, mean over heads
        return attention
