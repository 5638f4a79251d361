"""Farthest-first selection of dissimilar rows."""

from __future__ import annotations

import torch
from torch import Tensor


def farthest_first(states: Tensor, exists: Tensor, count: Tensor, *, repeats: bool = False) -> Tensor:
    """The picks of each group in order, int64 [G, max count], padded with −1.

    Distance is 1 − cosine similarity in float32. The first pick is the row farthest from its nearest other row, each
    next one the row farthest from its nearest pick (max-min). Memory is one [G, n, n] matrix; a pick costs O(n).

    Args:
        states: [G, n, width].
        exists: bool [G, n].
        count: int64 [G], number of picks; at most the number of existing rows. Best in the host's memory, where the
            largest is known without waiting for a device.
        repeats: whether a row may be picked again if all other rows are copies of picked ones.
    """
    groups = torch.arange(len(states), device=states.device)
    rows = torch.nn.functional.normalize(states.float(), dim=-1)
    distance = torch.bmm(rows, rows.transpose(1, 2)).neg_().add_(1).masked_fill_(~exists[:, None], float("inf"))
    own = distance.diagonal(dim1=1, dim2=2)
    # a row is not its own neighbour: mask the diagonal for the first pick
    kept, most = own.clone(), int(count.max()) if count.numel() else 0
    count = count.to(states.device, non_blocking=True)
    own.fill_(float("inf"))
    reach = distance.amin(2)  # distance to the nearest other row, later to the nearest pick
    own.copy_(kept)
    taken, picks = ~exists, []
    for step in range(most):
        pick = reach.masked_fill(taken, float("-inf")).argmax(1)
        picks.append(torch.where(step < count, pick, -1))
        reach = distance[groups, pick] if step == 0 else torch.minimum(reach, distance[groups, pick])
        if not repeats:
            taken = taken.scatter(1, pick[:, None], True)
    return torch.stack(picks, 1) if picks else count.new_zeros(len(states), 0)
