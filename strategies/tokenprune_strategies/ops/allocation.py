"""Numbers of tokens, and choices that look at nothing: shares, fair division, even spacing, seeded draws."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenprune.core.tokens import Tokens


def apportion(total: int, sizes: Sequence[int], least: int = 0) -> list[int]:
    """Divide `total` tokens over parts by size, with largest remainders; the result sums to min(total, Σ sizes).

    Args:
        total: tokens to give out.
        sizes: tokens in each part; no part gets more than it has.
        least: what every part that is not empty gets if `total` allows; else the largest parts get it.
    """
    available = sum(sizes)
    total = max(0, min(total, available))
    quotas = [total * size / available if available else 0.0 for size in sizes]
    shares = [min(size, max(least, int(quota))) for size, quota in zip(sizes, quotas, strict=True)]
    parts = range(len(sizes))
    while sum(shares) > total:
        part = max((i for i in parts if shares[i]), key=lambda i: (shares[i] > least, shares[i] - quotas[i]))
        shares[part] -= 1
    while sum(shares) < total:
        part = max((i for i in parts if shares[i] < sizes[i]), key=lambda i: quotas[i] - shares[i])
        shares[part] += 1
    return shares


def evenly(count: int, size: int) -> list[int]:
    """`count` different numbers out of 0 … size − 1, ascending, each in the middle of its `size / count` wide share."""
    return [(2 * i + 1) * size // (2 * count) for i in range(min(count, size))]


def even_cells(count: int, rows: int, columns: int) -> list[int]:
    """`count` different cells of a grid, raster numbers, ascending: even rows, and even cells in each of them."""
    used = min(rows, max(-(-count // columns), round((count * rows / columns) ** 0.5), 1))
    lengths = apportion(count, [columns] * used)
    return [
        row * columns + column
        for row, n in zip(evenly(used, rows), lengths, strict=True)
        for column in evenly(n, columns)
    ]


def images_of(tokens: Tokens, row: int) -> list[Tensor]:
    """The token numbers of each image of a batch row: int64 [N_image] each, in the order of the images."""
    numbers = tokens.image[row].masked_fill(~tokens.exists[row], -1)
    return [(numbers == image).nonzero().flatten() for image in sorted(set(numbers.tolist())) if image >= 0]


def grid_mask(tokens: Tokens, counts: Tensor) -> Tensor:
    """bool [batch, N] with `counts` (int [batch]) tokens per row spread over the grids of the row's images.

    Images share the count by their size. An image without a full rectangular grid is spaced in sequence order.
    """
    mask = torch.zeros_like(tokens.exists)
    for row, count in enumerate(counts.tolist()):
        images = images_of(tokens, row)
        for numbers, share in zip(images, apportion(count, [len(image) for image in images]), strict=True):
            cells = tokens.grid[row, numbers]
            rows, columns = (cells.amax(0) + 1).tolist()
            raster = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).to(cells)
            full = torch.equal(cells, raster)
            mask[row, numbers[even_cells(share, rows, columns) if full else evenly(share, len(numbers))]] = True
    return mask


def random_scores(tokens: Tokens, seed: int) -> Tensor:
    """float32 [batch, N]: a draw from [0, 1) for every token, the same for a row alone; −inf on padding."""
    scores = torch.full(tokens.exists.shape, float("-inf"), device=tokens.device)
    for row, count in enumerate(tokens.counts.tolist()):
        scores[row, :count] = torch.rand(count, generator=tokens.generator(seed)).to(tokens.device)
    return scores


def present_images(tokens: Tokens, row: int) -> list[Tensor]:
    """`images_of`, of each image only the tokens that take part now."""
    return [image[tokens.active[row, image]] for image in images_of(tokens, row)]


def top_by_image(tokens: Tokens, scores: Tensor) -> Tensor:
    """bool [batch, N]: the `tokens.target` highest of float [batch, N]; images share the number by their present size.

    Ties go to the lower number.
    """
    mask = torch.zeros_like(tokens.exists)
    for row, count in enumerate(tokens.target.tolist()):
        images = present_images(tokens, row)
        for image, share in zip(images, apportion(count, [len(image) for image in images]), strict=True):
            mask[row, image[scores[row, image].argsort(descending=True, stable=True)[:share]]] = True
    return mask
