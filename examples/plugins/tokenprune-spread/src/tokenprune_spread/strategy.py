"""Farthest-point selection: each token is the one least similar to all tokens taken before."""

from __future__ import annotations

import torch
from pydantic import Field
from torch.nn.functional import normalize

from tokenprune import Embeddings, ScorerStrategy, StrategyOptions


class Spread(ScorerStrategy):
    """Keep the image tokens that are farthest apart, by the cosine of their embeddings.

    The selection is Gonzalez' greedy one for k centres (1985); the first token is the one least similar to the mean.
    """

    name = "spread"
    reads = (Embeddings(),)

    class Options(StrategyOptions):
        """Options of `spread`."""

        keep: float = Field(0.25, gt=0, le=1, description="share of the image tokens that is kept")

    def score(self, stage, tokens):
        """Higher for tokens that are taken earlier; `tokens.target` are taken from each row."""
        return -taken(tokens.embeddings, tokens.active, int(tokens.target.max()))


def taken(states, active, count):
    """float32 [batch, N]: 0 for the token that is taken first, 1 for the second, ...; infinite for those never taken.

    Args:
        states: [batch, N, width].
        active: bool [batch, N], the tokens that can be taken.
        count: tokens to take in each row.
    """
    units = normalize(states.float(), dim=-1) * active[..., None]
    order = torch.full(active.shape, torch.inf, device=states.device)
    nearest = -(units * normalize(units.sum(1, keepdim=True), dim=-1)).sum(-1)
    for step in range(count):
        pick = nearest.masked_fill(~active | order.isfinite(), -torch.inf).argmax(1, keepdim=True)
        order.scatter_reduce_(1, pick, torch.full_like(nearest[:, :1], step), "amin")  # a row may run out of tokens
        like = (units @ units.gather(1, pick[..., None].expand(-1, -1, units.shape[-1])).mT).squeeze(-1)
        nearest = -like if step == 0 else torch.minimum(nearest, -like)
    return order.masked_fill(~active, torch.inf)
