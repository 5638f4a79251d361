"""VScan's choice of patches: the windows of a grid, the best of each window, the best of the rest, and the merge."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenprune_strategies.ops.others import without
from tokenprune_strategies.ops.ranks import ranks_in_groups

SIDE = 4  # windows along a side of the grid (llava), or tokens along a side of a window (qwen)


@dataclass(frozen=True, eq=False)
class Windows:
    """A division of a crop's n tokens into windows.

    Attributes:
        number: int64 [n], the window of each, on the tokens' device.
        sizes: int64 [windows], tokens in each, none of them 0; in the host's memory.
    """

    number: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, cells: Tensor, device: torch.device, *, fixed_size: bool) -> Windows:
        """Divide a crop; without cells, windows are runs of the sequence (ours).

        Args:
            cells: int64 [n, 2], (row, column) of each token, −1 where there is none; in the host's memory.
            device: of the tokens.
            fixed_size: whether windows are of 4 x 4 tokens, and what remains at the end belongs to the last ones; else
                4 x 4 windows divide the grid.
        """
        if int(cells.min()) < 0:
            window = _along(torch.arange(len(cells)), SIDE**2, fixed_size)
        else:
            lines, columns = (_along(one, SIDE, fixed_size) for one in (cells - cells.amin(0)).T)
            window = lines * (columns.amax() + 1) + columns
        _, number, sizes = torch.unique(window, return_inverse=True, return_counts=True)
        return cls(number.to(device, non_blocking=True), sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    def best(self, attention: Tensor, count: int, room: int) -> Tensor:
        """The `count` tokens of highest attention, at most `room` in a window, by falling attention; int64.

        They are fewer than `count` if the windows have no room for more.

        Args:
            attention: float32 [n].
            count: number of tokens.
            room: per window.
        """
        order = attention.argsort(descending=True, stable=True)
        rank = ranks_in_groups(order, self.number, self.sizes)[order]
        most = min(count, int(self.sizes.clamp(max=room).sum()))
        return order[(rank >= room).int().argsort(stable=True)[:most]]


def _along(places: Tensor, unit: int, fixed_size: bool) -> Tensor:
    """The window of each of `places`, int64, in one direction."""
    size = int(places.max()) + 1
    if fixed_size:
        return (places // unit).clamp(max=max(1, size // unit) - 1)
    return places * min(unit, size) // size


def best_of_rest(attention: Tensor, chosen: Tensor, count: int) -> Tensor:
    """int64 [count]: the tokens of highest attention without the chosen ones, by falling attention.

    Args:
        attention: float32 [n].
        chosen: int64 [m].
        count: number of tokens, at most n − m.
    """
    return without(attention.argsort(descending=True, stable=True), chosen, len(attention))[:count]


def merge_weights(rows: Tensor, kept: Tensor) -> Tensor:
    """float32 [k, n]: each kept token becomes the mean of itself and of the others that it is most similar to.

    Args:
        rows: [n, width], compared by cosine similarity.
        kept: int64 [k], k >= 1.
    """
    every = torch.arange(len(rows), device=rows.device)
    others, unit = without(every, kept, len(rows)), normalize(rows.float(), dim=-1)
    nearest = (unit[others] @ unit[kept].T).argmax(1)
    weights = torch.zeros(len(kept), len(rows), dtype=torch.float32, device=rows.device)
    weights[nearest, others] = 1
    weights[every[: len(kept)], kept] = 1
    return weights / weights.sum(1, keepdim=True)
