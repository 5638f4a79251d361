"""Nüwa's tensor operations: regions of the grid, anchors, and the weights with which anchors take in other patches."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenprune.errors import OptionError
from tokenprune_strategies.ops.ranks import ranks_in_groups

PUBLISHED_DIAGONAL = 2 * 23**2  # from corner to corner of 24 × 24 cells, squared


@dataclass(frozen=True, eq=False)
class Regions:
    """The regions of 2 × 2 cells of an image of n tokens.

    Attributes:
        cells: int64 [n, 2], row and column of each token.
        number: int64 [n], the region of each token, row by row; `count` for a token without a region.
        count: number of regions, R.
        height, width: of the grid, in cells. All in the host's memory.
    """

    cells: Tensor
    number: Tensor
    count: int
    height: int
    width: int

    @classmethod
    def of(cls, cells: Tensor, *, faithful: bool) -> Regions:
        """The regions of a grid.

        Args:
            cells: int64 [n, 2], −1 for tokens without a place; then all count as one line (ours).
            faithful: whether an odd last row or column forms no region; else its regions are smaller.
        """
        if bool((cells < 0).any()):
            cells = torch.stack((torch.zeros(len(cells), dtype=torch.int64), torch.arange(len(cells))), 1)
        height, width = (cells.amax(0) + 1).tolist()
        odd = 0 if faithful else 1
        down, across = (height + odd) // 2, (width + odd) // 2
        row, column = (cells // 2).unbind(1)
        number = torch.where((row < down) & (column < across), row * across + column, down * across)
        return cls(cells, number, down * across, height, width)

    @property
    def scale(self) -> float:
        """Squared diagonal of the grid, as a share of that of the published grid."""
        return ((self.height - 1) ** 2 + (self.width - 1) ** 2) / PUBLISHED_DIAGONAL

    def sizes(self) -> Tensor:
        """int64 [R + 1]: tokens in each region, and those without one."""
        return self.number.bincount(minlength=self.count + 1)

    def candidates(self, anchors: int, least: int, *, faithful: bool) -> Tensor:
        """int64 [R + 1]: how many candidates each region gives, and those without a region; at least `anchors` in all.

        Args:
            anchors: number of anchors, at most n.
            least: candidates of each region, more if they would be too few.
            faithful: as in the authors' code, which counts four cells for each region, and takes all cells if it needs
                four or more candidates of each.

        Raises:
            OptionError: with `faithful` they are too few.
        """
        sizes = self.sizes()
        if not faithful:
            while int(sizes.clamp(max=least).sum()) < anchors:
                least += 1
            return sizes.clamp(max=least)
        area = self.height * self.width
        if 4 * anchors > least * area:
            least = -(-4 * anchors // area)
            if least >= 4:
                return sizes
        found = sizes.clamp(max=least)
        found[self.count] = 0
        if int(found.sum()) < anchors:
            raise OptionError(
                f"strategy 'nuwa': option 'faithful': the authors' code finds {int(found.sum())} candidates in a grid "
                f"of {self.height} × {self.width}, fewer than the {anchors} tokens to keep of it; choose another "
                "'keep' or 'per_region', or faithful=False"
            )
        return found


def anchors_of(attention: Tensor, regions: Regions, candidates: Tensor, count: int) -> Tensor:
    """int64 [count], ascending: the candidates with the highest attention.

    Args:
        attention: float32 [n], attention of [CLS].
        regions: of the image.
        candidates: int64 [R + 1], how many tokens of each region are candidates, those with the highest attention.
        count: number of anchors; at most the sum of candidates.
    """
    number, limits = (part.to(attention.device, non_blocking=True) for part in (regions.number, candidates))
    order = attention.argsort(descending=True, stable=True)
    candidate = ranks_in_groups(order, number, regions.sizes()) < limits[number]
    best = attention.masked_fill(~candidate, float("-inf")).argsort(descending=True, stable=True)
    return best[:count].sort().values


def merge_weights(
    attention: Tensor, states: Tensor, regions: Regions, anchors: Tensor, distance: float, quantile: float
) -> Tensor:
    """float32 [k, n]: the weights with which each anchor sums the image's tokens.

    Args:
        attention: float32 [n], attention of [CLS].
        states: [n, C], compared by cosine similarity.
        regions: of the image.
        anchors: int64 [k].
        distance: squared distance in cells from which on nothing is taken in.
        quantile: of the anchors' attention; those at or above it take in nothing.
    """
    if not len(anchors):
        return attention.new_zeros(0, len(attention))
    numbers = torch.arange(len(anchors), device=anchors.device)
    unit = normalize(states.float(), dim=-1)
    likeness = (unit[anchors] @ unit.T).clamp(min=0)
    cells = regions.cells.to(anchors.device, non_blocking=True).float()
    away = (cells[anchors][:, None] - cells).square().sum(-1)
    # a grid of one cell has no distances
    near = 1 - (away / max(distance, 1e-6)).sqrt().clamp(max=1)
    weights = likeness * near
    own, place = attention[anchors], quantile * (len(anchors) - 1)
    ordered = own.sort().values
    high = own >= ordered[int(place)].lerp(ordered[ceil(place)], place - int(place))
    alone = torch.zeros_like(weights).index_put_((numbers, anchors), weights[numbers, anchors])
    weights = torch.where(high[:, None], alone, weights)
    weights = weights / (weights.sum(1, keepdim=True) + 1e-8)
    # its own state and, beside it, a mean from which its share is left out: weights sum to more than 1
    weights[numbers, anchors] = 1
    return weights
