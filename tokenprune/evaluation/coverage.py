"""The part of the image, and of a target, that the kept image tokens cover."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenprune.core.trace import Trace
from tokenprune.utils.masks import Mask, foreground

Box = tuple[float, float, float, float]


def token_map(values: Tensor, trace: Trace, row: int, image: int = 0) -> NDArray[np.float32]:
    """Values [N] of one row's image tokens on their grid: float32 [rows, columns], NaN in cells without a token.

    Args:
        values: one number per image token of the row.
        trace: of the run; its layout has the cells.
        row: batch row.
        image: image number within the row.
    """
    cells = trace.layout.gather_slots(trace.layout.grid)[row].cpu()
    here = (trace.layout.gather_slots(trace.layout.image_number)[row].cpu() == image) & (cells >= 0).all(-1)
    cells = cells[here]
    if not len(cells):
        return np.full((0, 0), np.nan, dtype=np.float32)
    height, width = (int(size) + 1 for size in cells.amax(0))
    grid = torch.full((height, width), float("nan"))
    grid[cells[:, 0], cells[:, 1]] = values.detach().float().cpu()[here]
    return np.asarray(grid.numpy(), dtype=np.float32)


def numbered_cells(trace: Trace, row: int, image: int = 0) -> tuple[tuple[int, int], Tensor]:
    """The size (rows, columns) of an image's grid, and each image token's cell in it, counted row by row from 0.

    Cells are int64 [N]; −1 for tokens of other images and for those without a cell. Arguments as of `token_map`.
    """
    cells = trace.layout.gather_slots(trace.layout.grid)[row].cpu()
    here = (trace.layout.gather_slots(trace.layout.image_number)[row].cpu() == image) & (cells >= 0).all(-1)
    if not here.any():
        return (0, 0), torch.full((len(cells),), -1)
    height, width = (int(size) + 1 for size in cells[here].amax(0))
    return (height, width), torch.where(here, cells[:, 0] * width + cells[:, 1], -1)


def places_at_end(trace: Trace) -> Tensor:
    """bool [batch, N]: places in the image that a token of the last stage has (all if there was no decision)."""
    return trace.stages[-1].places() if trace.stages else trace.exists


def cells_to_pixels(cells: NDArray[np.bool_], height: int, width: int, box: Box | None = None) -> NDArray[np.bool_]:
    """bool [height, width]: pixels with their centre in a marked cell.

    Args:
        cells: bool [rows, columns].
        height, width: of the image, in pixels.
        box: (top, left, bottom, right) that the cells divide evenly. Default: the image.
    """
    if not cells.size:
        return np.zeros((height, width), dtype=np.bool_)
    rows, columns = _lines((height, width), cells.shape, box)
    inside = (rows >= 0)[:, None] & (columns >= 0)
    return np.asarray(cells[rows][:, columns] & inside, dtype=np.bool_)


def _lines(pixels: tuple[int, int], cells: tuple[int, ...], box: Box | None) -> tuple[NDArray[np.int64], ...]:
    """Of each row and of each column of pixels, the row or column of cells that its middle is in; −1 outside."""
    top, left, bottom, right = box or (0.0, 0.0, float(pixels[0]), float(pixels[1]))
    found = []
    for size, count, start, end in zip(pixels, cells, (top, left), (bottom, right), strict=True):
        line = np.floor((np.arange(size) + 0.5 - start) / (end - start) * count).astype(np.int64)
        found.append(np.where((line >= 0) & (line < count), line, -1))
    return tuple(found)


def target_shares(target: Mask, trace: Trace, row: int, box: Box | None = None) -> NDArray[np.float64]:
    """How much of the cell of each of a row's image tokens shows the target: [N], from 0 to 1; 0 for tokens without a
    cell. Arguments as of `target_coverage`."""
    wanted = foreground(target)
    grid, numbers = numbered_cells(trace, row)
    rows, columns = _lines((wanted.shape[0], wanted.shape[1]), grid, box)
    inside = (rows >= 0)[:, None] & (columns >= 0)
    places, size = (rows[:, None] * grid[1] + columns)[inside], grid[0] * grid[1] or 1
    area, hit = np.bincount(places, minlength=size), np.bincount(places[wanted[inside]], minlength=size)
    cells = numbers.numpy()
    return np.where(cells < 0, 0.0, (hit / np.maximum(area, 1))[cells])


def target_coverage(target: Mask, trace: Trace, row: int, box: Box | None = None) -> float | None:
    """Share of the target's area whose place a kept token of the last stage has; None for an empty target."""
    wanted = foreground(target)
    area = int(wanted.sum())
    if not area:
        return None
    kept = token_map(places_at_end(trace)[row].float(), trace, row) == 1.0
    covered = cells_to_pixels(kept, wanted.shape[0], wanted.shape[1], box) & wanted
    return int(covered.sum()) / area
