"""The image and grid cell of each placeholder in a vision-language model's prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cells:
    """T placeholders in the order of the prompt.

    Attributes:
        image: int64 [T], number of the image; a crop or a frame counts as one.
        grid: int64 [T, 2], (row, column), −1 for separators and images without a grid.
        separator: bool [T], tokens that end a line of an image and show no part of it; pruning treats them as text
            (ours).
    """

    image: Tensor
    grid: Tensor
    separator: Tensor

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, kept: Tensor) -> Cells:
        """Those at which bool [T] `kept` is true."""
        return Cells(self.image[kept], self.grid[kept], self.separator[kept])

    @classmethod
    def empty(cls) -> Cells:
        """No placeholders."""
        return cls(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0).bool())

    @classmethod
    def square(cls, count: int) -> Cells:
        """One image of `count` tokens; cells in row-major order if that is a square number."""
        side = round(count**0.5)
        if side * side == count:
            return cls.lines(side, side)
        return cls.at(torch.full((count, 2), -1))

    @classmethod
    def lines(cls, rows: int, columns: int, *, separated: bool = False) -> Cells:
        """One image in row-major order, with or without a separator at the end of each row."""
        cells = torch.cartesian_prod(torch.arange(rows), torch.arange(columns + separated)).reshape(-1, 2)
        separator = cells[:, 1] == columns
        grid = torch.where(separator[:, None], -1, cells)
        return cls(torch.zeros(len(cells), dtype=torch.int64), grid, separator)

    @classmethod
    def at(cls, grid: Tensor) -> Cells:
        """One image with these grid cells, int64 [T, 2]."""
        return cls(torch.zeros(len(grid), dtype=torch.int64), grid, torch.zeros(len(grid)).bool())

    @classmethod
    def lone_separator(cls) -> Cells:
        """A separator that belongs to no line."""
        return cls.lines(1, 0, separated=True)

    @classmethod
    def joined(cls, parts: Sequence[Cells]) -> Cells:
        """Concatenated images, renumbered."""
        parts = [part for part in parts if len(part)]
        if not parts:
            return cls.empty()
        images, start = [], 0
        for part in parts:
            images.append(part.image + start)
            start += int(part.image.max()) + 1
        return cls(torch.cat(images), torch.cat([p.grid for p in parts]), torch.cat([p.separator for p in parts]))
