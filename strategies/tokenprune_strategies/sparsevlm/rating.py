"""SparseVLM's raters (text tokens), and its correction of attention for positions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokenprune.core.tokens import Tokens

RATERS = "raters"


def raters(tokens: Tokens) -> Tensor:
    """bool [batch, T]: the text tokens after the last image that are most similar to the image tokens on average.

    A softmax over these text tokens of (image embedding · text embedding), unscaled; mean over image tokens; raters are
    the text tokens whose mean is above the average. If there are none, all text after the image; if there is none after
    it, all text (ours).
    """
    # only text after the image; embeddings are compared, before any layer
    after = tokens.text & (tokens.images_before == tokens.counts[:, None])
    likeness = tokens.embeddings.float() @ tokens.text_embeddings.float().transpose(1, 2)
    shares = likeness.masked_fill(~after[:, None], float("-inf")).softmax(2)
    means = shares.masked_fill(~tokens.exists[..., None], 0).sum(1) / tokens.counts.clamp(min=1)[:, None]
    average = means.masked_fill(~after, 0).sum(1) / after.sum(1).clamp(min=1)
    found: Tensor = after & (means > average[:, None])
    for others in (after, tokens.text):
        found = torch.where(found.any(1, keepdim=True), found, others)
    return found


class Corrected(NamedTuple):
    """The result of `corrected_attention`.

    Attributes:
        attention: float32 [batch, heads, Q, N], 0 for missing raters and inactive tokens.
        raters: float32 [batch], number of raters in each row.
    """

    attention: Tensor
    raters: Tensor


def corrected_attention(attention: Tensor, kernel: Tensor, active: Tensor, floor: float) -> Corrected:
    """Attention without the part that depends only on positions.

    Args:
        attention: float32 [batch, heads, Q, N], see `AttentionFrom`.
        kernel: float32 [batch, Q, N], see `PositionKernel`; zeros for missing query rows.
        active: bool [batch, N].
        floor: lower bound of the kernel, as a share of its largest absolute value in the query row; 0 = no bound.
    """
    missing = (kernel == 0) | ~active[:, None]
    rows = (~missing).any(2).sum(1)
    if floor:
        kernel = torch.maximum(kernel, floor * kernel.abs().amax(2, keepdim=True))
    # 0 / 1 for a missing rater or token, so that sums ignore it
    corrected = attention.masked_fill(missing[:, None], 0) / kernel.masked_fill(missing, 1)[:, None]
    return Corrected(corrected, rows.clamp(min=1).float())
