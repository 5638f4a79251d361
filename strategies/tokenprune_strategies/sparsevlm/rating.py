"""Text tokens that rate image tokens, as SparseVLM chooses them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokenprune.core.tokens import Tokens

RATERS = "raters"


def raters(tokens: Tokens) -> Tensor:
    """bool [batch, T]: the text tokens after the last image that are most similar to the image tokens on average.

    A softmax over these text tokens of (image embedding · text embedding), unscaled; mean over image tokens; a text
    token rates if its mean is above the average of the means. If none is, all text after the image rates; if
    there is none after it, all text (ours).
    """
    # only text after the image rates; embeddings are compared, before any layer
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
        attention: float32 [batch, heads, Q, N], 0 if there is none.
        raters: float32 [batch], how many each row has.
    """

    attention: Tensor
    raters: Tensor


def corrected_attention(attention: Tensor, kernel: Tensor, active: Tensor, floor: float) -> Corrected:
    """Attention without the part that depends only on positions.

    Args:
        attention: float32 [batch, heads, Q, N], see `AttentionFrom`.
        kernel: float32 [batch, Q, N], see `PositionKernel`; zeros for the query rows that a batch row lacks.
        active: bool [batch, N].
        floor: the kernel is raised to this share of its largest absolute value in the query row; 0 = as it is.
    """
    missing = (kernel == 0) | ~active[:, None]
    rows = (~missing).any(2).sum(1)
    if floor:
        kernel = torch.maximum(kernel, floor * kernel.abs().amax(2, keepdim=True))
    # 0 / 1 where a row lacks the rater or the token, so that sums over raters and tokens ignore it
    corrected = attention.masked_fill(missing[:, None], 0) / kernel.masked_fill(missing, 1)[:, None]
    return Corrected(corrected, rows.clamp(min=1).float())
