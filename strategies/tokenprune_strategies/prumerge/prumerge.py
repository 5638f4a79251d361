"""PruMerge and PruMerge+ (Shang et al., "LLaVA-PruMerge", arXiv 2403.15388)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tokenprune.core.decisions import Decision, Merge
from tokenprune.core.options import Amount, tokens_of
from tokenprune.core.reads import ClsAttention, Projector, Read, ReceivedAttention, TowerFeatures, TowerKeys
from tokenprune.core.stage import Positions, Shape, Stage
from tokenprune.core.strategy import Strategy, StrategyOptions
from tokenprune.core.tokens import Tokens
from tokenprune_strategies.ops.allocation import apportion, evenly, images_of
from tokenprune_strategies.prumerge.merging import merge_weights, outlier_share, place, without_extra


class PruMerge(Strategy):
    """Keep the image tokens that [CLS] attends to most in the vision tower, and merge each one's neighbours into it.

    All of it happens within each image, before the projector: (1) [CLS] attention of the tower's last layer, full
    width; (2) the share of outliers (above Q3 + 1.5·IQR) is the share kept; (3) each kept token adds its 32
    nearest tokens by key similarity, weighted by their attention; (4) one extra token sums up the tokens not kept.

    A tower without [CLS] scores by the attention that each patch receives (mean over heads and patches), and where the
    projector does not take image tokens one by one, what is merged are the projected tokens (ours).

    Ours: the share is taken per image (the authors: over the batch), at least one token is kept, and where nothing is
    dropped there is no extra token.
    """

    name = "prumerge"
    budget_option = "keep"

    class Options(StrategyOptions):
        """Options of PruMerge and PruMerge+."""

        ratio: Literal["adaptive"] | Annotated[float, Field(gt=0, le=1)] = Field(
            "adaptive", description="share of the tokens taken by attention; adaptive = share of outliers"
        )
        keep: Amount | None = Field(
            None, description="tokens left in a row, the extra ones included: an int or a share; overrides ratio"
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
        if self.options.keep is None and self.budget is None:
            return {}
        return {"ratio": "beside keep" if self.budget is None else "beside a budget"}

    def stages(self, shape: Shape) -> Iterable[Stage]:
        """One stage before the first layer; without `keep` only the picture tells how many tokens there will be."""
        keep = self.options.keep
        number = None if keep is None else tokens_of(keep, shape.image_tokens)
        score: Read = ClsAttention(heads="joint") if shape.offers(ClsAttention) else ReceivedAttention()
        merges: tuple[Read, ...] = (TowerFeatures(), Projector()) if shape.offers(TowerFeatures, Projector) else ()
        yield Stage("merge", 0, number, (score, TowerKeys(), *merges))

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        """Select and merge, image by image."""
        reads = {type(read) for read in stage.reads}
        attention = tokens.cls_attention if ClsAttention in reads else tokens.received_attention
        rows = [self._row(row, tokens, attention[row]) for row in range(len(tokens.exists))]
        index, origin = (pad_sequence([row[i] for row in rows], batch_first=True, padding_value=-1) for i in (0, 1))
        weights, scores = (pad_sequence([row[i] for row in rows], batch_first=True) for i in (2, 3))
        values = None
        if Projector in reads:
            features = tokens.features.masked_fill(~tokens.exists[..., None], 0)
            values = tokens.project((weights @ features.float()).to(features.dtype))
        return Merge(index, values=values, scores=scores, weights=weights, origin=origin)

    def _row(self, row: int, tokens: Tokens, received: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of one batch row: slots int64 [m], origins int64 [m], weights float32 [m, N], scores float32 [N]."""
        size = tokens.exists.shape[1]
        scores = torch.full((size,), float("-inf"), device=tokens.device)
        images = images_of(tokens, row)
        shares = apportion(int(tokens.target[row]), [len(image) for image in images])
        parts = [(scores.new_zeros(0).long(), scores.new_zeros(0).long(), scores.new_zeros(0, size))]
        for image, share in zip(images, shares, strict=True):
            attention, keys = received[image], tokens.keys[row, image]
            scores[image] = attention
            kept = self.selected(attention, None if self.options.keep is None else share)
            weights = merge_weights(attention, keys, kept)
            extra = len(image) > len(kept) and (self.options.keep is None or share > len(kept))
            parts.append(place(image, kept, weights if extra else weights[:-1], size, self.options.positions))
        slots, origins, merging = (torch.cat(part) for part in zip(*parts, strict=True))
        return slots, origins, merging, scores

    def selected(self, attention: Tensor, number: int | None) -> Tensor:
        """Tokens kept of one image, int64 [k], by falling attention.

        Args:
            attention: float32 [N], of [CLS].
            number: tokens to end up with, the extra one included; None = by the option `ratio`.
        """
        order = attention.argsort(descending=True, stable=True)
        if number is not None:
            return order[: without_extra(number, len(order))]
        return order[: max(1, int(len(order) * self.share(attention)))]

    def share(self, attention: Tensor) -> float:
        """The share of the image's tokens that are taken by attention."""
        return outlier_share(attention) if self.options.ratio == "adaptive" else self.options.ratio


class PruMergePlus(PruMerge):
    """PruMerge with spatially uniform tokens besides the most attended ones.

    Adaptive: with step = int(1 / ratio), every int(step / 3)-th token is added unless it is kept already. Fixed ratio:
    every step-th token from step // 2 on. The authors' code lets such a token repeat one already kept; ours drops the
    repeat. `keep`: half by attention, half evenly spaced among the others (ours), so that the number is exact. A stride
    below 1, from ratios above 1/3, counts as 1 (ours).
    """

    name = "prumerge+"

    def selected(self, attention: Tensor, number: int | None) -> Tensor:
        """Tokens kept of one image, int64 [k]: by falling attention, then the uniform ones in image order."""
        order, size = attention.argsort(descending=True, stable=True), len(attention)
        if number is not None:
            count = without_extra(number, size)
            top = order[: (count + 1) // 2]
            rest = order[len(top) :].sort().values
            return torch.cat((top, rest[evenly(count - len(top), len(rest))]))
        ratio = max(self.share(attention), 1 / size)
        top, step = order[: max(1, int(size * ratio))], int(1 / ratio)
        adaptive = self.options.ratio == "adaptive"
        first, stride = (0, max(1, step // 3)) if adaptive else (step // 2, step)
        uniform = torch.arange(first, max(first, size - 1), stride, device=order.device)
        return torch.cat((top, uniform[~torch.isin(uniform, top)]))
