"""Places of tokens among those of their group."""

from __future__ import annotations

import torch
from torch import Tensor


def ranks_in_groups(order: Tensor, group: Tensor, sizes: Tensor) -> Tensor:
    """int64 [n]: how many tokens of the same group come before each token.

    Args:
        order: int64 [n], the tokens, the best first.
        group: int64 [n], the group of each token, on the device of `order`.
        sizes: int64 [groups], tokens in each; in the host's memory, which need not wait to know them.
    """
    starts = (sizes.cumsum(0) - sizes).to(order.device, non_blocking=True)
    by_group = order[group[order].argsort(stable=True)]
    ranks = torch.arange(len(order), device=order.device) - starts[group[by_group]]
    return torch.empty_like(order).scatter(0, by_group, ranks)
