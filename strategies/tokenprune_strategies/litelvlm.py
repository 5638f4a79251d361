"""LiteLVLM (Lee and Choi, "CLIP Tricks You: Training-free Token Pruning for Efficient Pixel Grounding in Large
Vision-Language Models", arXiv 2605.13178)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize, one_hot
from torch.nn.utils.rnn import pad_sequence

from tokenprune.core.decisions import Decision, Keep, Merge
from tokenprune.core.options import WORDING, Amount, Wording, tokens_of
from tokenprune.core.reads import (
    ClipImageEmbeddings,
    ClipTextEmbeddings,
    ClsQuery,
    HiddenStates,
    TowerKeys,
    TowerValues,
)
from tokenprune.core.stage import Positions, Shape, Stage
from tokenprune.core.strategy import Strategy, StrategyOptions
from tokenprune.core.tokens import Tokens
from tokenprune_strategies.ops.allocation import apportion
from tokenprune_strategies.ops.crops import crop_reads, every_crop


class LiteLVLM(Strategy):
    """Keep the image tokens *least* like what is asked, in CLIP's space, and fill up by context, before the decoder.

    Of K tokens each of M questions takes the ⌊K/M⌋ of lowest similarity, not normalised; what their union leaves free
    goes to the best context scores: the softmax, over patches, of the cosine of [CLS] query and key divided by √C, in
    the tower's last layer, times the length of the value. The decoder gets the context tokens by falling score, then
    the others in image order. With one question there are no context tokens.

    Ours: every batch row chooses for itself, by its own questions; several crops of a row share K by size.
    """

    name = "litelvlm"
    budget_option = "keep"

    class Options(StrategyOptions):
        """Options of LiteLVLM."""

        keep: Amount = Field(0.334, description="K, image tokens kept: an int counts them, a float is a share")
        wording: Wording = Field("question", description=WORDING)
        order: Literal["chosen", "image"] = Field(
            "chosen", description="chosen: context tokens first, as the authors do; image: all in image order"
        )
        positions: Positions = Field(
            "renumber", description="renumber: compact, as the authors do; keep: kept tokens stay at their own places"
        )

    options: Options

    def __init__(self, *, budget: float | None = None, **options: Any) -> None:
        """Raises OptionError or BudgetError, see Strategy."""
        super().__init__(budget=budget, **options)
        self.positions = self.options.positions

    def without_effect(self) -> Mapping[str, str]:
        """See `Strategy.without_effect`."""
        return {"order": "with positions=keep"} if self.positions == "keep" else {}

    def stages(self, shape: Shape) -> Iterable[Stage]:
        """One stage before the first layer."""
        text = ClipTextEmbeddings(self.options.wording, "truncate")
        reads = (HiddenStates(), ClsQuery(), TowerKeys(), TowerValues(), ClipImageEmbeddings(), text)
        yield Stage("select", 0, tokens_of(self.options.keep, shape.image_tokens), (*reads, *crop_reads(shape)))

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        """Select in every crop."""
        texts, exists = tokens.clip_text_embeddings
        similar = tokens.clip_image_embeddings @ texts.transpose(1, 2)
        scores = torch.full(tokens.exists.shape, float("-inf"), device=tokens.device)
        slots, origins = [], []
        for row, target in enumerate(tokens.target.tolist()):
            crops = every_crop(stage, tokens, row)
            where, chosen = [tokens.image.new_zeros(0)], [tokens.image.new_zeros(0)]
            for crop, share in zip(crops, apportion(target, [len(crop) for crop in crops]), strict=True):
                query, keys, values = (read[row, crop] for read in (tokens.cls_query, tokens.keys, tokens.values))
                scores[row, crop] = context = context_scores(query, keys, values)
                chosen.append(crop[select(similar[row, crop][:, exists[row]], context, share)])
                where.append(crop[:share])
            slots.append(torch.cat(where).sort().values)
            origins.append(torch.cat(chosen))
        origin = pad_sequence(origins, batch_first=True, padding_value=-1)
        if self.positions == "keep" or self.options.order == "image":
            mask = one_hot(origin + 1, tokens.exists.shape[1] + 1).amax(1)[:, 1:].bool()
            return Keep.where(mask, scores=scores)
        index = pad_sequence(slots, batch_first=True, padding_value=-1)
        states = tokens.hidden.gather(1, origin.clamp(min=0)[..., None].expand(-1, -1, tokens.hidden.shape[-1]))
        weights = one_hot(origin.clamp(min=0), tokens.exists.shape[1]).float()
        return Merge(index, values=states, scores=scores, weights=weights, origin=origin)


def context_scores(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """float32 [n]: weight that [CLS] gives to each patch, times the length of its value; all arguments [n, C]."""
    likeness = (normalize(query, dim=-1) * normalize(keys, dim=-1)).sum(-1)
    weights: Tensor = (likeness * keys.shape[-1] ** -0.5).softmax(0) * values.norm(dim=-1)
    return weights


def select(similar: Tensor, context: Tensor, count: int) -> Tensor:
    """Patches kept of an image, int64 [count]: context patches by falling score, then the unlike ones ascending.

    Args:
        similar: [n, M], to each of M texts.
        context: [n].
        count: K.
    """
    chosen = torch.zeros_like(context, dtype=torch.bool)
    lowest = similar.argsort(dim=0, stable=True)[: count // max(1, similar.shape[1])]
    chosen[lowest.flatten()] = True
    unlike = chosen.nonzero().flatten()
    ranked = context.argsort(descending=True, stable=True)
    return torch.cat((ranked[~chosen[ranked]][: count - len(unlike)], unlike))
