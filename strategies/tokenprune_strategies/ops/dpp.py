"""Determinantal point processes: selection of dissimilar items of high quality."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def map_picks(states: Tensor, weights: Tensor, exists: Tensor, counts: Tensor) -> Tensor:
    """Greedy MAP inference of G determinantal point processes: picks int64 [G, max count] in order, padded with −1.

    Memory is one [G, n, n] matrix; pick t costs O(n · t).

    Args:
        states: [G, n, width]; the kernel is their cosine similarity.
        weights: float32 [G, n], which multiply the kernel on both sides.
        exists: bool [G, n].
        counts: int64 [G], number of picks; at most the number of existing rows. Best in the host's memory, where the
            largest is known without waiting for a device.
    """
    groups, most = torch.arange(len(states), device=states.device), int(counts.max()) if counts.numel() else 0
    counts = counts.to(states.device, non_blocking=True)
    rows = normalize(states.float(), dim=-1)
    kernel = rows @ rows.transpose(1, 2)
    gains = kernel.diagonal(dim1=1, dim2=2) * weights**2
    floor = gains.amax(1, keepdim=True) * 1e-6  # a smaller gain is rounding error (ours)
    found = states.new_zeros(most, *weights.shape, dtype=torch.float32)
    taken, picks = ~exists, []
    for step in range(most):
        best = gains.masked_fill(taken, float("-inf")).argmax(1)
        spent = gains[groups, best, None] <= floor
        best = torch.where(spent[:, 0], weights.masked_fill(taken, float("-inf")).argmax(1), best)
        picks.append(torch.where(step < counts, best, -1))
        taken = taken.scatter(1, best[:, None], True)
        # one step of a Cholesky decomposition: the pick's row of the kernel, given the earlier picks
        row = weights[groups, best, None] * kernel[groups, best] * weights
        row = row - torch.einsum("tg,tgn->gn", found[:step, groups, best], found[:step])
        found[step] = (row / gains[groups, best, None].clamp(min=0).sqrt()).masked_fill(spent, 0)
        gains = gains - found[step] ** 2
    return torch.stack(picks, 1) if picks else counts.new_zeros(len(states), 0)
