"""HoloV (Zou et al., "Don't Just Chase 'Highlighted Tokens' in MLLMs: Revisiting Visual Holistic Context Retention",
https://arxiv.org/abs/2510.02912)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from tokenprune import Decision, Keep, Merge, MergeGroup, Shape, Stage, Strategy, StrategyOptions, Tokens
from tokenprune.core.options import COMPACT, KEPT, Amount, tokens_of
from tokenprune.core.reads import ClsAttention, Crops, Embeddings
from tokenprune.core.stage import Positions
from tokenprune.core.tokens import ImageTokens
from tokenprune.errors import OptionError
from tokenprune.utils.host_copies import on_host
from tokenprune_strategies.ops.stacked_images import StackedImages


class HoloV(Strategy):
    """Divide an image into blocks, and keep in each the tokens that [CLS] attends to most: as many as the block's score
    says, so that all parts of the image remain represented.

    Ours: crops, images and batch rows are independent (the authors join the tiles of an image to one sequence); an
    image of fewer tokens than blocks has a block for each; tokens that a block has no room for go to the next best.
    """

    name = "holov"
    budget_option = "keep"

    class Options(StrategyOptions):
        """Options of HoloV."""

        keep: Amount = Field(0.112, description=KEPT)
        blocks: int = Field(16, ge=1, description="blocks that an image or crop is divided into, in sequence order")
        faithful: bool = Field(
            False,
            description="as in the authors' code: tokens stay in the order of their attention in each block, rows of "
            "zeros replace those that a block has no room for, and the score of a block of one token is not scaled",
        )
        positions: Positions = Field("renumber", description=COMPACT)

    options: Options

    def __init__(self, *, budget: float | None = None, **options: Any) -> None:
        """Raises OptionError or BudgetError, see Strategy."""
        super().__init__(budget=budget, **options)
        if self.options.faithful and self.positions == "keep":
            raise OptionError(
                "strategy 'holov': options 'faithful' and positions='keep' found, but tokens in another order and rows "
                "of zeros have no original positions; use one of them"
            )

    def stages(self, shape: Shape) -> Iterable[Stage]:
        """One stage before the first layer."""
        # the projector's output, and attention of the second-to-last tower layer
        reads = (Embeddings(), ClsAttention(-2), *shape.offered(Crops()))
        yield Stage("select", 0, tokens_of(self.options.keep, shape.image_tokens), reads)

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        """Score the blocks of all crops, divide the quota of each crop over its blocks, and select in each block."""
        crops, faithful = tokens.images(), self.options.faithful
        # (1) blocks are runs of the sequence, the first ones a token longer if it does not divide evenly
        runs = [crop.index_on_host.tensor_split(min(self.options.blocks, len(crop))) for crop in crops]
        parts = [
            ImageTokens(crop.row, crop.image, one, 0, one) for crop, own in zip(crops, runs, strict=True) for one in own
        ]
        blocks = StackedImages.of(tokens, parts)
        attention = blocks.take(tokens.cls_attention)
        # (2) a block's score is the mean of its tokens' scores
        scores = token_scores(blocks.take(tokens.embeddings), attention, blocks.exists, faithful=faithful)
        (means,) = on_host(scores.sum(1) / blocks.exists.sum(1))
        # (3) the blocks share the quota in proportion to their scores
        quotas: list[int] = []
        for crop, own, mean in zip(crops, runs, means.split_with_sizes([len(own) for own in runs]), strict=True):
            quotas += block_quotas(mean, [len(one) for one in own], crop.quota, faithful=faithful)
        # (4) the tokens of each block that [CLS] attends to most
        picks = highest(attention, blocks.exists, torch.tensor(quotas, dtype=torch.int64))
        shown = blocks.spread(scores, tokens)
        if not faithful:
            return Keep.where(blocks.mask(picks, tokens), scores=shown)
        picked = iter(blocks.picked(picks))
        groups = [in_order(crop, torch.cat([next(picked) for _ in own])) for crop, own in zip(crops, runs, strict=True)]
        return Merge.from_groups(tokens, groups, scores=shown)


def token_scores(rows: Tensor, attention: Tensor, exists: Tensor, *, faithful: bool) -> Tensor:
    """float32 [G, n]: the scores of the tokens in G blocks, 0 on padding.

    Args:
        rows: [G, n, width], projected.
        attention: float32 [G, n], attention of [CLS].
        exists: bool [G, n].
        faithful: whether the score of a block of one token is its attention, a thousandth of what it is elsewhere.
    """
    size = exists.sum(1, keepdim=True)
    others = (size - 1).clamp(min=1)
    unit = rows.float() / (rows.float().norm(dim=-1, keepdim=True) + 1e-6)
    unit = unit.masked_fill(~exists[..., None], 0)
    alike = unit @ unit.mT
    alike.diagonal(dim1=1, dim2=2).zero_()
    # variance of a token's similarity to the others; the authors' sum includes the zero on the diagonal
    away = (alike - (alike.sum(2) / others)[..., None]).masked_fill(~exists[:, None], 0)
    variance = (away.square().sum(2) / others).masked_fill(~exists, 0)
    seen = (1000 * attention).masked_fill(~exists, 0)
    # scaled so that its mean is 0.09 times that of the attention; so it hardly changes the mean over the block
    scale = (seen.sum(1, keepdim=True) / size) / (variance.sum(1, keepdim=True) / size + 1e-6)
    scores = seen + 0.09 * variance * scale
    return torch.where(size == 1, attention.masked_fill(~exists, 0), scores) if faithful else scores


def block_quotas(means: Tensor, sizes: Sequence[int], total: int, *, faithful: bool) -> list[int]:
    """Tokens to keep in each block of a crop; they sum to `total`.

    Args:
        means: float32 [P], the blocks' scores, in the host's memory.
        sizes: tokens in each block; only with `faithful` may a quota be larger.
        total: the crop's quota.
        faithful: see the option.
    """
    weights = (means / (means.sum() + 1e-6)).nan_to_num(0, 0, 0)  # NaN is refused later
    quotas = [int(quota) for quota in (weights * total).floor()]
    if not faithful:
        quotas = [min(quota, size) for quota, size in zip(quotas, sizes, strict=True)]
    best = weights.argsort(descending=True, stable=True).tolist()
    while rest := total - sum(quotas):  # one more for each of the best blocks (that has room)
        for block in [one for one in best if faithful or quotas[one] < sizes[one]][:rest]:
            quotas[block] += 1
    return quotas


def highest(attention: Tensor, exists: Tensor, quotas: Tensor) -> Tensor:
    """int64 [G, n]: each block's tokens of highest attention in falling order, padded with −1.

    A block that has no more than its quota stays in its own order.
    """
    places, size = torch.arange(exists.shape[1], device=attention.device), exists.sum(1, keepdim=True)
    quotas = quotas.to(attention.device, non_blocking=True)[:, None]
    order = attention.masked_fill(~exists, float("-inf")).argsort(dim=1, descending=True, stable=True)
    order = torch.where(quotas < size, order, places)
    return torch.where(places < quotas.minimum(size), order, -1)


def in_order(crop: ImageTokens, picked: Tensor) -> MergeGroup:
    """Picked tokens in the given order, at the crop's first places, and rows of zeros up to its quota."""
    origin = pad(picked, (0, crop.quota - len(picked)), value=-1)
    each = (origin[:, None] == crop.index).float()  # each new token consists of one, or of none
    return MergeGroup(crop.row, crop.index[: crop.quota], crop.index, each, origin)
