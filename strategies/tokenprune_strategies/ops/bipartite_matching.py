"""Bipartite soft matching, as pure tensor operations on the tokens of one image."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenprune_strategies.ops.others import without


def bipartite_merge(metric: Tensor, mass: Tensor, count: int, per_round: float = 0.5) -> Tensor:
    """int64 [n]: the token that each of n tokens is merged into, or itself if it is not; `count` different ones.

    A round merges the most similar pairs of tokens with even and odd indices, ties by the lower number; later rounds
    compare the means of merged tokens.

    Args:
        metric: [n, C], compared by cosine similarity in float32.
        mass: float32 [n], weight of each token in a mean.
        count: number of tokens to reach, at least 1.
        per_round: largest share of the current tokens that a round merges; at least one is merged.
    """
    sums, mass = metric.float() * mass[:, None], mass.clone()
    into = alive = torch.arange(len(metric), device=metric.device)
    while len(alive) > max(count, 1):
        # A and B alternate: each token of A has one edge, to the most similar token of B
        means = torch.nn.functional.normalize(sums[alive] / mass[alive, None], dim=-1)
        likeness, nearest = (means[::2] @ means[1::2].T).max(1)
        # merge the best edges, no more than needed
        most = min(len(alive) - count, max(1, int(per_round * len(alive))))
        merged = likeness.argsort(descending=True, stable=True)[:most]
        source, target = alive[::2][merged], alive[1::2][nearest[merged]]
        sums.index_add_(0, target, sums[source])
        mass.index_add_(0, target, mass[source])
        # tokens merged into a token of A in an earlier round move with it
        moves = torch.arange(len(metric), device=metric.device)
        moves[source] = target
        into, alive = moves[into], without(alive, source, len(metric))
    return into


def merged_means(states: Tensor, mass: Tensor, into: Tensor, index: Tensor) -> Tensor:
    """[batch, k, width] in the states' dtype: for each of `index`, the mass-weighted mean of all tokens merged into it.

    Args:
        states: [batch, N, width].
        mass: float32 [batch, N], 0 for tokens to ignore.
        into: int64 [batch, N], the token that each is merged into.
        index: int64 [batch, k], −1 as padding.
    """
    where = index.clamp(min=0)
    moved = into != torch.arange(into.shape[1], device=into.device)
    sums = (states * mass[..., None]).float()
    sums = sums.scatter_add(1, into[..., None].expand_as(sums), sums * moved[..., None])
    total = mass.scatter_add(1, into, mass * moved)
    means = (sums / total.clamp(min=1e-12)[..., None]).to(states.dtype)
    alone = total == mass  # nothing was merged into it: its state is unchanged
    means = torch.where(alone[..., None], states, means)
    return means.gather(1, where[..., None].expand(-1, -1, states.shape[-1]))
