"""Which positions of a batch of sequences are image tokens, text, padding or query rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from tokenprune.errors import InputError


@dataclass(frozen=True)
class SequenceLayout:
    """Where the image tokens, the text and the padding of every batch row are.

    An *image-token number* counts the image tokens of one row in sequence order, over all images of the row:
    0 … N_row − 1. Strategies use these numbers; only the engine uses positions in the sequence.

    Attributes:
        image_tokens: bool [batch, sequence], True where an image token stands.
        valid: bool [batch, sequence], False on padding (left or right).
        image_number: int64 [batch, sequence], which image of the row a token belongs to, −1 elsewhere.
        grid: int64 [batch, sequence, 2], (row, column) of the token's grid cell, −1 where it has none.
        queries: named query rows, each bool [batch, sequence] ("mask_query", "seg", …).
        drafted: bool [batch, sequence], True on the tokens of an expected answer that the same forward checks. They
            follow the prompt, and are hidden from strategies, whose decisions are those of the prompt alone; None =
            there are none.
        host: the same layout in the host's memory, from which everything whose size depends on values is made, since
            the host would have to wait for a device to know the size; None = this one is there.
    """

    image_tokens: Tensor
    valid: Tensor
    image_number: Tensor
    grid: Tensor
    queries: Mapping[str, Tensor] = field(default_factory=dict)
    drafted: Tensor | None = None
    host: SequenceLayout | None = field(default=None, repr=False, compare=False)

    @classmethod
    def from_mask(
        cls,
        image_tokens: Tensor,
        attention_mask: Tensor | None = None,
        *,
        image_number: Tensor | None = None,
        grid: Tensor | None = None,
        queries: Mapping[str, Tensor] | None = None,
        drafted: Tensor | None = None,
    ) -> SequenceLayout:
        """Build a layout from a bool [batch, sequence] mask of image tokens; the other masks as in the attributes.

        Without `image_number` every maximal run of image tokens is one image; without `grid` a run whose length is a
        square number is laid out row by row, any other run gets no cells.

        Raises:
            InputError: shapes that do not match, or an image token on padding or without an image.
        """
        if image_tokens.dim() != 2:
            raise InputError(f"image_tokens: found shape {list(image_tokens.shape)}, expected [batch, sequence]")
        image_tokens = image_tokens.bool()
        valid = (
            torch.ones_like(image_tokens) if attention_mask is None else attention_mask.to(image_tokens.device).bool()
        )
        named = {**(queries or {}), "attention_mask": valid}
        if drafted is not None:
            named["drafted"] = drafted
        for name, mask in named.items():
            if mask.shape != image_tokens.shape:
                raise InputError(
                    f"{name}: found shape {list(mask.shape)}, expected {list(image_tokens.shape)} like image_tokens"
                )
        if (image_tokens & ~valid).any():
            raise InputError("image_tokens: some image tokens lie on padding; mask them out or mark them as valid")
        if image_number is None:
            image_number = _number_runs(image_tokens)
        elif (image_number[image_tokens] < 0).any():
            raise InputError("image_number: −1 found on image tokens; expected the number of their image, from 0")
        if grid is None:
            grid = _square_grids(image_number)
        marks = {name: mask.bool() for name, mask in (queries or {}).items()}
        return cls(image_tokens, valid, image_number, grid, marks, None if drafted is None else drafted.bool())

    @property
    def on_host(self) -> SequenceLayout:
        """The layout in the host's memory."""
        return self if self.host is None else self.host

    def to(self, device: torch.device) -> SequenceLayout:
        """This layout, which is in the host's memory, on a device."""
        if device == self.valid.device:
            return self

        def sent(values: Tensor) -> Tensor:
            return values.to(device, non_blocking=True)

        return SequenceLayout(
            sent(self.image_tokens),
            sent(self.valid),
            sent(self.image_number),
            sent(self.grid),
            {name: sent(rows) for name, rows in self.queries.items()},
            None if self.drafted is None else sent(self.drafted),
            host=self,
        )

    def _sent(self, values: Tensor) -> Tensor:
        return values.to(self.valid.device, non_blocking=True)

    @cached_property
    def counts(self) -> Tensor:
        """int64 [batch]: image tokens per row, N_row."""
        return self.image_tokens.sum(1)

    @cached_property
    def slots(self) -> Tensor:
        """int64 [batch, N]: sequence position of every image token, −1 where a row has fewer than N = max N_row."""
        return true_positions(self.image_tokens) if self.host is None else self._sent(self.host.slots)

    @cached_property
    def text_slots(self) -> Tensor:
        """int64 [batch, T]: sequence position of every text token, −1 where a row has fewer than T."""
        if self.host is not None:
            return self._sent(self.host.text_slots)
        return true_positions(self.prompt & ~self.image_tokens)

    @cached_property
    def grid_sizes(self) -> dict[tuple[int, int], tuple[int, int]]:
        """(rows, columns) of every image's grid, by batch row and image number; images without cells are left out."""
        images, cells = self.on_host.image_number, self.on_host.grid
        known = self.on_host.image_tokens & (cells >= 0).all(-1)
        sizes: dict[tuple[int, int], tuple[int, int]] = {}
        for row in range(len(images)):
            for image in sorted({*images[row][known[row]].tolist()}):
                height, width = (cells[row][known[row] & (images[row] == image)].amax(0) + 1).tolist()
                sizes[row, image] = height, width
        return sizes

    @cached_property
    def prompt(self) -> Tensor:
        """bool [batch, sequence]: the real tokens of the prompt, without those of a drafted answer."""
        return self.valid if self.drafted is None else self.valid & ~self.drafted

    @cached_property
    def places(self) -> Tensor:
        """int64 [batch, sequence]: how many real tokens stand before a position."""
        return self.valid.long().cumsum(1) - self.valid.long()

    def gather_slots(self, values: Tensor) -> Tensor:
        """Values [batch, sequence, …] at the image tokens: [batch, N, …]; −1 (False, 0.0) where a row has no token."""
        return self._gather(values, self.slots)

    def gather_text(self, values: Tensor) -> Tensor:
        """The same at the text tokens: [batch, T, …]."""
        return self._gather(values, self.text_slots)

    def marked(self, name: str, text: Tensor) -> SequenceLayout:
        """This layout with one more kind of query row.

        Args:
            name: of the rows.
            text: bool [batch, T], the text tokens that are such rows, in the host's memory.
        """
        if self.host is not None:
            host = self.host.marked(name, text)
            return replace(self, queries={**self.queries, name: self._sent(host.queries[name])}, host=host)
        length, slots = self.valid.shape[1], self.text_slots
        rows = torch.zeros(len(slots), length + 1, dtype=torch.bool, device=slots.device)
        rows.scatter_(1, torch.where(slots < 0, length, slots), text)  # the last column is where −1 points to
        return replace(self, queries={**self.queries, name: rows[:, :length]})

    def only(self, rows: Tensor) -> SequenceLayout:
        """This layout without the image tokens of the rows that bool [batch] `rows`, on the host, does not mark."""
        if self.host is not None:
            host = self.host.only(rows)
            return replace(self, image_tokens=self._sent(host.image_tokens), valid=self._sent(host.valid), host=host)
        others = self.image_tokens & ~rows[:, None]
        return replace(self, image_tokens=self.image_tokens & ~others, valid=self.valid & ~others)

    @staticmethod
    def _gather(values: Tensor, slots: Tensor) -> Tensor:
        index = (
            slots.clamp(min=0)
            .reshape(*slots.shape, *([1] * (values.dim() - 2)))
            .expand(*slots.shape, *values.shape[2:])
        )
        taken = values.gather(1, index)
        missing = (slots < 0).reshape(*slots.shape, *([1] * (values.dim() - 2)))
        fill = -1 if values.dtype == torch.int64 else 0
        return taken.masked_fill(missing, fill)

    def query_rows(self, name: str) -> Tensor:
        """int64 [batch, Q]: positions of the named query rows, −1 where a row has fewer than Q.

        "last" is always known (the last position of the prompt). "mask_query" falls back to "last" if the caller marked
        none; this lets segmentation strategies run on plain language models (ours).

        Raises:
            InputError: a name that the caller did not mark, or a row without such a position.
        """
        if self.host is not None:
            return self._sent(self.host.query_rows(name))
        if name not in self.queries and name in ("last", "mask_query"):
            length = self.valid.shape[1]
            steps = torch.arange(length, device=self.valid.device)
            return torch.where(self.prompt, steps, -1).amax(1, keepdim=True)
        if name not in self.queries:
            known = ", ".join(sorted({*self.queries, "last", "mask_query"}))
            raise InputError(f"query row {name!r} is not marked in this run; known rows: {known}")
        marked = self.queries[name]
        empty = (~marked.any(1)).nonzero().flatten().tolist()
        if empty:
            raise InputError(f"query row {name!r}: batch rows {empty} mark no position; mark at least one per row")
        return true_positions(marked)


def true_positions(mask: Tensor) -> Tensor:
    """Column numbers of the True entries of bool [batch, n], ascending, padded with −1: int64 [batch, max count]."""
    counts = mask.sum(1)
    width = int(counts.max()) if counts.numel() else 0
    order = mask.int().argsort(dim=1, descending=True, stable=True)[:, :width]
    filled = torch.arange(width, device=mask.device) < counts[:, None]
    return torch.where(filled, order, -1)


def _number_runs(image_tokens: Tensor) -> Tensor:
    starts = image_tokens.clone()
    starts[:, 1:] &= ~image_tokens[:, :-1]
    return torch.where(image_tokens, starts.long().cumsum(1) - 1, -1)


def _square_grids(image_number: Tensor) -> Tensor:
    grid = torch.full((*image_number.shape, 2), -1, dtype=torch.int64, device=image_number.device)
    for row, numbers in enumerate(image_number):
        for image in range(int(numbers.max()) + 1 if numbers.numel() else 0):
            where = (numbers == image).nonzero().flatten()
            side = round(len(where) ** 0.5)
            if side * side == len(where):
                cells = torch.arange(len(where), device=grid.device)
                grid[row, where] = torch.stack((cells // side, cells % side), 1)
    return grid
