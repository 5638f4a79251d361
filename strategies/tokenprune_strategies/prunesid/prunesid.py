"""PruneSID (Fang et al., "Prune Redundancy, Preserve Essence: Vision Token Compression in VLMs via Synergistic
Importance-Diversity", https://arxiv.org/abs/2603.09480)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby

import torch
from pydantic import Field
from torch.nn.functional import normalize

from tokenprune import Decision, Merge, Shape, Stage, Strategy, StrategyOptions, Tokens
from tokenprune.core.options import COMPACT, Amount, tokens_of
from tokenprune.core.reads import ClsAttention, ClsFeatures, Crops, Projector, TowerFeatures
from tokenprune.core.stage import Positions
from tokenprune.core.tokens import ImageTokens
from tokenprune_strategies.ops.before_projector import projected
from tokenprune_strategies.prunesid.kept import Kept, check_authors_keep, new_tokens
from tokenprune_strategies.prunesid.selection import Patches, loadings, threshold


class PruneSID(Strategy):
    """Keep [CLS], and of each group of patches those that it attends to most and that do not resemble each other.

    Groups are principal directions of the tower's features. All steps are within each crop, before the projector.

    Ours: the directions are exact (the authors': approximated from a random start, on which groups depend), and tokens
    stay in image order; any number of tokens, and a crop that keeps all its tokens is unchanged; a row's tokens are
    divided over its crops in proportion to their size.
    """

    name = "prunesid"
    budget_option = "keep"

    class Options(StrategyOptions):
        keep: Amount = Field(
            0.112, description="tokens that remain in a row, [CLS] included: number (int) or share (float)"
        )
        faithful: bool = Field(
            False, description="as in the authors' code: groups from a random start, tokens in the order of groups"
        )
        seed: int = Field(0, description="random seed of that start, with faithful")
        positions: Positions = Field("renumber", description=COMPACT)

    options: Options

    def without_effect(self) -> Mapping[str, str]:
        return {} if self.options.faithful else {"seed": "unless faithful"}

    def stages(self, shape: Shape) -> Iterable[Stage]:
        """One stage before the first layer."""
        # attention of the second-to-last tower layer, whose output is the projector's input
        reads = (ClsAttention(-2), TowerFeatures(), ClsFeatures(), Projector(), *shape.offered(Crops()))
        yield Stage("select", 0, tokens_of(self.options.keep, shape.image_tokens), reads)

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        """Compare the patches of all crops, then select in each on the host."""
        faithful, crops = self.options.faithful, tokens.images()
        several = [crop for crop in crops if faithful or 1 < crop.quota < len(crop)]
        compared = iter(Patches.on_host([self.compared(crop, tokens) for crop in several]))
        # (4) drop similar patches, divide the quota over the groups, select in each; (5) in image order, with [CLS]
        kept = [Kept.of(crop, next(compared) if crop in several else None, in_order=not faithful) for crop in crops]
        images = groupby(kept, key=lambda one: (one.crop.row, one.crop.image))
        groups = [new_tokens(list(image), self.positions, tokens.device) for _, image in images]
        # features that are not finite are refused as scores are
        scores = (tokens.cls_attention + 0 * tokens.features.float().sum(-1)).masked_fill(~tokens.exists, float("-inf"))
        merged = Merge.from_groups(tokens, groups, scores=scores)
        return projected(merged, tokens, [(one.crop.row, int(one.crop.index_on_host[0])) for one in kept if one.cls])

    def compared(self, crop: ImageTokens, tokens: Tokens) -> Patches:
        """What is chosen from in a crop."""
        states, total, start = tokens.features[crop.row, crop.index].float(), crop.quota, None
        size, channels = states.shape
        number = max(1, min(total // 4, channels - 1))
        if self.options.faithful:
            check_authors_keep(crop, channels)
            number, draw = total // 4, tokens.generator(self.options.seed)  # the same start for all crops
            start = torch.randn(min(size, channels), number, generator=draw, dtype=torch.float32)
            start = start.to(tokens.device, non_blocking=True)
        # (1) a group for every four tokens to keep: the principal direction that a patch belongs to most
        groups = loadings(states, number, start).argmax(1)
        # (2) patches are similar if their cosine similarity is above T / 32 times its mean over all pairs
        unit = normalize(states, dim=-1)
        likeness = unit @ unit.T
        # (3) in each group, those that [CLS] attends to most come first
        order = tokens.cls_attention[crop.row, crop.index].argsort(descending=True, stable=True)
        return Patches(groups, order, likeness > threshold(likeness, total))
