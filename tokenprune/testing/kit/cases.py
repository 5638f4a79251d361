"""Batches for the conformance kit: images, text and padding, drawn from a few readable numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from tokenprune.core.layout import SequenceLayout


@dataclass(frozen=True)
class Row:
    """One batch row: text, then images with a text token between them, then text.

    Attributes:
        images: (height, width) of each image's grid.
        before, after: text tokens at the two ends.
        seed: of everything drawn for the row, which is the same in any batch.
    """

    images: tuple[tuple[int, int], ...]
    before: int = 1
    after: int = 2
    seed: int = 0


@dataclass(frozen=True)
class Case:
    """The input of one example of an invariant.

    Attributes:
        family: key in `tokenprune.testing.kit.decoder_families.FAMILIES`.
        rows: of the batch.
        padding: side of the padding, "left" or "right".
        budget: of the strategy; None = its options as they are.
    """

    family: str
    rows: tuple[Row, ...]
    padding: str = "right"
    budget: float | None = None

    def alone(self, row: int) -> Case:
        """The case with one of its rows only."""
        return replace(self, rows=(self.rows[row],))


class SyntheticBatch:
    """The tensors of a batch.

    Attributes:
        rows: that it was made of.
        layout: of the batch.
        grid: int64 [batch, S, 2], as `tokenprune.prune` takes it.
        positions: int64 [batch, S], as a model counts them.
        positions_3d: int64 [3, batch, S], as Qwen2-VL counts them: images in two dimensions.
    """

    def __init__(self, rows: tuple[Row, ...], padding: str, *, new: int = 0) -> None:
        """`new` text tokens follow every row, after the padding (they are decoded later)."""
        self.rows, self.padding, self.new = rows, padding, new
        parts = [_cells(row) for row in rows]
        length = max(len(cells) for cells in parts)
        self.length = length
        image = torch.zeros(len(rows), length + new, dtype=torch.bool)
        valid, grid = image.clone(), torch.full((*image.shape, 2), -1)
        valid[:, length:] = True
        number = torch.full(image.shape, -1)
        self.starts = [length - len(cells) if padding == "left" else 0 for cells in parts]
        for row, (cells, start) in enumerate(zip(parts, self.starts, strict=True)):
            valid[row, start : start + len(cells)] = True
            for place, cell in enumerate(cells, start):
                if cell is not None:
                    image[row, place], number[row, place] = True, cell[0]
                    grid[row, place] = torch.tensor(cell[1:])
        self.grid, self.number = grid, number
        self.layout = SequenceLayout.from_mask(image, valid, grid=grid, image_number=number)
        self.positions = (valid.long().cumsum(1) - 1).clamp(min=0)

    @property
    def mask(self) -> Tensor | None:
        """int64 [batch, S], 0 on padding; None if there is none."""
        return None if bool(self.layout.valid.all()) else self.layout.valid.long()

    @cached_property
    def positions_3d(self) -> Tensor:
        """See the class."""
        found = torch.zeros(3, *self.layout.valid.shape, dtype=torch.int64)
        for row in range(len(self.rows)):
            following, base, image = 0, 0, -1
            for place, valid in enumerate(self.layout.valid[row].tolist()):
                if not valid:
                    found[:, row, place] = max(following - 1, 0)
                elif self.layout.image_tokens[row, place]:
                    cell = self.grid[row, place].tolist()
                    if int(self.number[row, place]) != image:
                        image, base = int(self.number[row, place]), following
                    found[:, row, place] = torch.tensor([base, base + cell[0], base + cell[1]])
                    following = max(following, base + max(cell) + 1)
                else:
                    found[:, row, place] = following
                    following += 1
        return found

    def embeds(self, width: int) -> Tensor:
        """float32 [batch, S, width]: the decoder's input, zeros on padding."""
        result = torch.zeros(*self.layout.valid.shape, width)
        for row, (cells, start) in enumerate(zip(map(_cells, self.rows), self.starts, strict=True)):
            seed = self.rows[row].seed
            shared = drawn("shared", seed, 1, width)  # by the row's image tokens: no mean of them is near zero
            images = torch.tensor([cell is not None for cell in cells])[:, None]
            result[row, start : start + len(cells)] = drawn("embeds", seed, len(cells), width) + shared * images
            result[row, self.length :] = drawn("new", seed, self.new, width)
        return result


def drawn(what: str, seed: int, *shape: int) -> Tensor:
    """float32 of that shape, standard normal; the same for the same words and seed."""
    generator = torch.Generator().manual_seed(seed * 7919 + sum((i + 1) * ord(c) for i, c in enumerate(what)))
    return torch.randn(*shape, generator=generator)


def _cells(row: Row) -> list[tuple[int, int, int] | None]:
    """Each position of a row: (image, grid row, grid column), or None for text."""
    found: list[tuple[int, int, int] | None] = [None] * row.before
    for number, (height, width) in enumerate(row.images):
        found += [None] if number else []
        found += [(number, cell // width, cell % width) for cell in range(height * width)]
    return found + [None] * row.after
