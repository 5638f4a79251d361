"""LiteLVLM (Lee and Choi, "CLIP Tricks You: Training-free Token Pruning for Efficient Pixel Grounding in Large
Vision-Language Models", https://arxiv.org/abs/2605.13178)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from tokenprune import (
    Crops,
    Decision,
    HiddenStates,
    Keep,
    Merge,
    MergeGroup,
    Shape,
    Stage,
    Strategy,
    StrategyOptions,
    Tokens,
)
from tokenprune.core.options import COMPACT, KEPT, WORDING, Amount, Wording, tokens_of
from tokenprune.core.reads import ClipImageEmbeddings, ClipTextEmbeddings, ClsQuery, TowerKeys, TowerValues
from tokenprune.core.stage import Positions
from tokenprune.utils.host_copies import on_host


class LiteLVLM(Strategy):
    """Keep the image tokens *least* similar to the question in CLIP's space, and context tokens, before the decoder.

    Of K tokens, each of M questions selects the ⌊K/M⌋ least similar; the rest are the tokens with the largest
    contribution to [CLS] (context). With one question there are no context tokens.

    Ours: batch rows are independent, each with its own questions; crops of a row share K in proportion to their size.
    """

    name = "litelvlm"
    budget_option = "keep"

    class Options(StrategyOptions):
        """Options of LiteLVLM."""

        keep: Amount = Field(0.334, description=f"K, {KEPT}")
        wording: Wording = Field("question", description=WORDING)
        order: Literal["chosen", "image"] = Field(
            "chosen", description="chosen (context tokens first, as in the authors' code) or image (image order)"
        )
        positions: Positions = Field("renumber", description=COMPACT)

    options: Options

    def without_effect(self) -> Mapping[str, str]:
        """See `Strategy.without_effect`."""
        return {"order": "with positions=keep"} if self.positions == "keep" else {}

    def stages(self, shape: Shape) -> Iterable[Stage]:
        """One stage before the first layer."""
        text = ClipTextEmbeddings(self.options.wording, "truncate")
        reads = (HiddenStates(), ClsQuery(), TowerKeys(), TowerValues(), ClipImageEmbeddings(), text)
        yield Stage("select", 0, tokens_of(self.options.keep, shape.image_tokens), (*reads, *shape.offered(Crops())))

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        """Select tokens of each crop."""
        texts, exists = tokens.clip_text_embeddings
        (real,) = on_host(exists)  # one copy for all rows, since a device has to be waited for
        similar = tokens.clip_image_embeddings @ texts.transpose(1, 2)  # not normalised, as in the authors' code
        scores = torch.full(tokens.exists.shape, float("-inf"), dtype=torch.float32, device=tokens.device)
        mask, groups = torch.zeros_like(tokens.exists), []
        for row, crops in enumerate(tokens.images_by_row()):
            chosen, slots = [tokens.image.new_zeros(0)], [tokens.image.new_zeros(0)]
            which = real[row].nonzero().flatten().to(tokens.device, non_blocking=True)
            for crop in crops:
                query, keys, values = (read[row, crop.index] for read in (tokens.cls_query, tokens.keys, tokens.values))
                scores[row, crop.index] = context = context_scores(query, keys, values)
                chosen.append(crop.index[select(similar[row, crop.index][:, which], context, crop.quota)])
                slots.append(crop.index[: crop.quota])
            order = torch.cat(chosen)
            mask[row, order] = True
            # the decoder receives them in this order: the k-th at the k-th slot of the row, whatever its crop
            each = torch.eye(len(order), dtype=torch.float32, device=tokens.device)
            groups.append(MergeGroup(row, torch.cat(slots).sort().values, order, each, order))
        if self.positions == "keep" or self.options.order == "image":
            return Keep.where(mask, scores=scores)
        moved = Merge.from_groups(tokens, groups, scores=scores)
        assert moved.origin is not None
        # gathered rather than summed by weights, so that the states are bit-identical
        where = moved.origin.clamp(min=0)[..., None].expand(-1, -1, tokens.hidden.shape[-1])
        return replace(moved, values=tokens.hidden.gather(1, where))


def context_scores(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """float32 [n]: attention of [CLS] to each patch times the norm of its value; all arguments [n, C].

    In the tower's last layer, with all heads concatenated.
    """
    likeness = (normalize(query, dim=-1) * normalize(keys, dim=-1)).sum(-1)
    # only over patches; cosines divided by √C are so small that the softmax is almost flat, and the norm decides
    weights: Tensor = (likeness * keys.shape[-1] ** -0.5).softmax(0) * values.norm(dim=-1)
    return weights


def select(similar: Tensor, context: Tensor, count: int) -> Tensor:
    """The K patches to keep, int64 [count]: context patches by descending score, then dissimilar ones in image order.

    Args:
        similar: [n, M], similarity to each of M texts.
        context: [n], context scores.
        count: K.
    """
    chosen = torch.zeros_like(context, dtype=torch.bool)
    lowest = similar.argsort(dim=0, stable=True)[: count // max(1, similar.shape[1])]
    chosen[lowest.flatten()] = True  # the union over texts: one patch may be the least similar to several
    ranked, numbers = context.argsort(descending=True, stable=True), torch.arange(len(context), device=context.device)
    # the rank of each other patch; numbers rather than lists, whose length a device would have to be waited for
    rank = torch.empty_like(ranked).scatter_(0, ranked, (~chosen[ranked]).long().cumsum(0) - 1)
    others = torch.where(rank < count - chosen.sum(), rank, 2 * len(context))
    return torch.where(chosen, len(context) + numbers, others).argsort(stable=True)[:count]
