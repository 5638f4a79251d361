"""Selection independent of content: even spacing and random numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenprune.core.apportion import apportion
from tokenprune.core.tokens import Tokens


def evenly(count: int, size: int) -> list[int]:
    """`count` different numbers of 0 … size − 1, ascending, in the middle of intervals of length size / count."""
    return [(2 * i + 1) * size // (2 * count) for i in range(min(count, size))]


def even_cells(count: int, rows: int, columns: int) -> list[int]:
    """Raster numbers of `count` different cells of a grid, ascending: evenly spaced rows and cells in each row."""
    used = min(rows, max(-(-count // columns), round((count * rows / columns) ** 0.5), 1))
    lengths = apportion(count, [columns] * used)
    return [
        row * columns + column
        for row, n in zip(evenly(used, rows), lengths, strict=True)
        for column in evenly(n, columns)
    ]


def grid_mask(tokens: Tokens) -> Tensor:
    """bool [batch, N]: the quota of each image, spaced evenly over its grid.

    Without a full rectangular grid, tokens are spaced evenly in sequence order.
    """
    mask = torch.zeros(tokens.exists.shape, dtype=torch.bool)  # on the host, which knows the grid
    for image in tokens.images():
        cells = tokens.on_host("grid")[image.row, image.index_on_host]
        rows, columns = (cells.amax(0) + 1).tolist()
        raster = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        order = (cells[:, 0] * columns + cells[:, 1]).argsort()  # tiles of one image follow each other
        full = torch.equal(cells[order], raster)
        chosen = order[even_cells(image.quota, rows, columns)] if full else evenly(image.quota, len(image))
        mask[image.row, image.index_on_host[chosen]] = True
    return mask.to(tokens.device, non_blocking=True)


def random_scores(tokens: Tokens, seed: int) -> Tensor:
    """float32 [batch, N]: a random number from [0, 1) for each token, independent of other rows; −inf on padding."""
    scores = torch.full(tokens.exists.shape, float("-inf"), dtype=torch.float32)  # whatever torch's default dtype is
    for row, count in enumerate((tokens.on_host("image") >= 0).sum(1).tolist()):
        scores[row, :count] = torch.rand(count, generator=tokens.generator(seed), dtype=torch.float32)
    return scores.to(tokens.device, non_blocking=True)
