"""PruMerge and PruMerge+ (Shang et al., "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal
Models", https://arxiv.org/abs/2403.15388)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from tokenprune import Decision, Merge, Shape, Stage, Strategy, StrategyOptions, Tokens
from tokenprune.core.options import COMPACT, Amount, tokens_of
from tokenprune.core.reads import ClsAttention, Projector, Read, ReceivedAttention, TowerFeatures, TowerKeys
from tokenprune.core.stage import Positions
from tokenprune_strategies.ops.before_projector import projected
from tokenprune_strategies.ops.even_and_random import evenly
from tokenprune_strategies.prumerge.merging import merge_weights, outlier_share, place, without_extra


class PruMerge(Strategy):
    """Keep the image tokens that [CLS] attends to most in the vision tower, and merge each one's neighbours into it.

    All steps are within each image, before the projector; the image's attention determines the number of kept tokens.

    If the tower has no [CLS], the score is the attention that each patch receives (mean over heads and patches); if the
    projector does not work token by token, the projected tokens are merged (ours).

    Ours: the share is computed per image (the authors: over the batch), at least one token is kept, and if nothing is
    dropped there is no extra token.
    """

    name = "prumerge"
    budget_option = "keep"

    class Options(StrategyOptions):
        """Options of PruMerge and PruMerge+."""

        ratio: Literal["adaptive"] | Annotated[float, Field(gt=0, le=1)] = Field(
            "adaptive", description="share of tokens selected by attention; adaptive = share of outliers"
        )
        keep: Amount | None = Field(
            None, description="tokens that remain, extra ones included: number (int) or share (float); overrides ratio"
        )
        positions: Positions = Field("renumber", description=COMPACT)

    options: Options

    def without_effect(self) -> Mapping[str, str]:
        """See `Strategy.without_effect`."""
        if self.options.keep is None and self.budget is None:
            return {}
        return {"ratio": "with keep" if self.budget is None else "with a budget"}

    def stages(self, shape: Shape) -> Iterable[Stage]:
        """One stage before the first layer; without `keep` the number of tokens depends on the image."""
        keep = self.options.keep
        number = None if keep is None else tokens_of(keep, shape.image_tokens)
        score: Read = ClsAttention(heads="joint") if shape.offers(ClsAttention) else ReceivedAttention()
        yield Stage("merge", 0, number, (score, TowerKeys(), *shape.offered(TowerFeatures(), Projector())))

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        """Select and merge, image by image."""
        reads = {type(read) for read in stage.reads}
        # (1) attention of the tower's last layer, from [CLS] to each patch
        attention = tokens.cls_attention if ClsAttention in reads else tokens.received_attention
        exact, groups = self.options.keep is not None, []
        for image in tokens.images():
            scores = attention[image.row, image.index]
            # (2) keep the most attended tokens, as many as there are outliers (above Q3 + 1.5 · IQR)
            kept = self.selected(scores, image.quota if exact else None)
            # (3) each kept token adds its 32 nearest by key similarity, weighted by their attention; (4) an extra token
            # sums the tokens that are not kept
            weights = merge_weights(scores, tokens.keys[image.row, image.index], kept)
            extra = len(image) > len(kept) and (not exact or image.quota > len(kept))
            groups.append(place(image, kept, weights if extra else weights[:-1], self.positions))
        scores = attention.float().masked_fill(~tokens.exists, float("-inf"))
        merged = Merge.from_groups(tokens, groups, scores=scores)
        if Projector not in reads:
            return merged  # the sums are over the tokens in the decoder
        return projected(merged, tokens)  # sums of the tower's features

    def selected(self, attention: Tensor, number: int | None) -> Tensor:
        """Kept tokens of one image, int64 [k], by descending attention.

        Args:
            attention: float32 [N], attention of [CLS].
            number: resulting number of tokens, the extra one included; None = from the option `ratio`.
        """
        order = attention.argsort(descending=True, stable=True)
        if number is not None:
            return order[: without_extra(number, len(order))]
        return order[: max(1, int(len(order) * self.share(attention)))]

    def share(self, attention: Tensor) -> float:
        """The share of the image's tokens to select by attention."""
        return outlier_share(attention) if self.options.ratio == "adaptive" else self.options.ratio


class PruMergePlus(PruMerge):
    """PruMerge with evenly spaced tokens in addition to the most attended ones.

    Adaptive: with step = int(1 / ratio), every int(step / 3)-th token is added unless already kept. Fixed ratio: every
    step-th token from step // 2 on. In the authors' code such a token may repeat a kept one; here it does not (ours).
    With `keep`: half by attention, half evenly spaced among the others (ours).
    """

    name = "prumerge+"

    def selected(self, attention: Tensor, number: int | None) -> Tensor:
        """Kept tokens of one image, int64 [k]: by descending attention, then the evenly spaced ones in image order."""
        order, size = attention.argsort(descending=True, stable=True), len(attention)
        if number is not None:
            count = without_extra(number, size)  # half and half, with the exact total (ours)
            top = order[: (count + 1) // 2]
            rest = order[len(top) :].sort().values
            even = torch.tensor(evenly(count - len(top), len(rest)), dtype=torch.int64)
            return torch.cat((top, rest[even.to(rest.device, non_blocking=True)]))
        ratio = max(self.share(attention), 1 / size)
        top, step = order[: max(1, int(size * ratio))], int(1 / ratio)
        adaptive = self.options.ratio == "adaptive"
        # the authors' strides; for ratios above 1/3 they would be 0, and are 1 (ours)
        first, stride = (0, max(1, step // 3)) if adaptive else (step // 2, step)
        uniform = torch.arange(first, max(first, size - 1), stride, device=order.device)
        return torch.cat((top, uniform[~torch.isin(uniform, top)]))
