"""CDPruner (Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in
MLLMs", arXiv 2506.10967)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from tokenprune.core.decisions import Decision, Keep
from tokenprune.core.options import WORDING, Amount, Wording, tokens_of
from tokenprune.core.reads import ClipImageEmbeddings, ClipTextEmbeddings, HiddenStates
from tokenprune.core.stage import Positions, Shape, Stage
from tokenprune.core.strategy import Strategy, StrategyOptions
from tokenprune.core.tokens import Tokens
from tokenprune_strategies.ops.allocation import apportion
from tokenprune_strategies.ops.crops import crop_reads, every_crop
from tokenprune_strategies.ops.dpp import map_picks


class CDPruner(Strategy):
    """Keep the image tokens that are most diverse, given what is asked, before the first decoder layer.

    A determinantal point process (section 3): its kernel is the cosine similarity of projected image tokens, weighted
    by relevance on both sides; relevance is minus the cosine of a token and the question in CLIP's space (mean over
    segments of a long question), scaled to 0 … 1 over the row. Greedy MAP inference picks tokens one by one. Tokens
    *less* like the text weigh more, as in the authors' code.

    Ours: every batch row chooses for itself; where the kernel's rank is used up, the rest is picked by relevance (the
    authors' code repeats tokens then, and so keeps fewer).
    """

    name = "cdpruner"
    budget_option = "keep"

    class Options(StrategyOptions):
        """Options of CDPruner."""

        keep: Amount = Field(0.112, description="image tokens kept: an int counts them, a float is a share")
        wording: Wording = Field("question", description=WORDING)
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
        text = ClipTextEmbeddings(self.options.wording, "segments")
        reads = (HiddenStates(), ClipImageEmbeddings(), text, *crop_reads(shape))
        yield Stage("select", 0, tokens_of(self.options.keep, shape.image_tokens), reads)

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        """Pick in every crop, all crops of the batch at once."""
        texts, exists = tokens.clip_text_embeddings
        scores = relevance(tokens.clip_image_embeddings, texts, exists, tokens.active)
        rows: list[int] = []
        crops: list[Tensor] = []
        shares: list[int] = []
        for row, target in enumerate(tokens.target.tolist()):
            found = every_crop(stage, tokens, row)
            rows += [row] * len(found)
            crops += found
            shares += apportion(target, [len(crop) for crop in found])
        mask = torch.zeros_like(tokens.exists)
        if crops:
            index = pad_sequence(crops, batch_first=True, padding_value=-1)
            where = torch.tensor(rows, device=index.device)[:, None], index.clamp(min=0)
            picks = map_picks(tokens.hidden[where], scores[where], index >= 0, index.new_tensor(shares))
            for row, crop, picked in zip(rows, index, picks, strict=True):
                mask[row, crop[picked[picked >= 0]]] = True
        return Keep.where(mask, scores=scores.masked_fill(~tokens.active, float("-inf")))


def relevance(images: Tensor, texts: Tensor, exists: Tensor, active: Tensor) -> Tensor:
    """float32 [batch, N]: how unlike the texts each image token is, scaled to 0 … 1 over the row.

    Args:
        images: float32 [batch, N, P].
        texts: float32 [batch, M, P].
        exists: bool [batch, M], which texts there are.
        active: bool [batch, N], which tokens count.
    """
    likeness = normalize(images, dim=-1) @ normalize(texts, dim=-1).transpose(1, 2)
    values = -(likeness * exists[:, None]).sum(2) / exists.sum(1, keepdim=True)
    low = values.masked_fill(~active, float("inf")).amin(1, keepdim=True)
    high = values.masked_fill(~active, float("-inf")).amax(1, keepdim=True)
    return ((values - low + 1e-6) / (high - low).clamp(min=1e-6)).masked_fill(~active, 0)
