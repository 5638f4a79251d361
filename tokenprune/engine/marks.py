"""What stands where in the input of one prefill, as the caller or an adapter tells it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokenprune.errors import InputError
from tokenprune.layout import SequenceLayout


@dataclass(frozen=True)
class Marks:
    """Masks over the expanded prompt; all [batch, prompt].

    Attributes:
        image_tokens: bool, where the image tokens stand.
        queries: named query rows, bool each.
        grid: int64 [batch, prompt, 2], grid cells of the image tokens; None = square images row by row.
        image_number: int64; None = every run of image tokens is one image.
        attention_mask: 0 on padding; None = what the decoder itself is called with.
    """

    image_tokens: Tensor
    queries: Mapping[str, Tensor] = field(default_factory=dict)
    grid: Tensor | None = None
    image_number: Tensor | None = None
    attention_mask: Tensor | None = None

    def layout(self, hidden: Tensor, attention_mask: Tensor | None) -> SequenceLayout:
        """The layout of a prefill.

        Args:
            hidden: [batch, sequence, width], what enters the decoder.
            attention_mask: [batch, total], what the decoder is called with, if it is two-dimensional.

        Raises:
            InputError: masks that do not fit the input.
        """
        batch, length = hidden.shape[:2]

        def fit(mask: Tensor | None, fill: int) -> Tensor | None:
            return None if mask is None else _fit(mask.to(hidden.device), batch, length, fill)

        image_tokens = fit(self.image_tokens, 0)
        assert image_tokens is not None
        mask = attention_mask if self.attention_mask is None else self.attention_mask
        return SequenceLayout.from_mask(
            image_tokens,
            None if mask is None else mask[:, -length:],
            grid=fit(self.grid, -1),
            image_number=fit(self.image_number, -1),
            queries={name: _fit(rows.to(hidden.device), batch, length, 0) for name, rows in self.queries.items()},
        )


def _fit(mask: Tensor, batch: int, length: int, fill: int) -> Tensor:
    """A mask over the prompt, repeated for returned sequences and extended over tokens generated without a cache."""
    if batch % len(mask) or mask.shape[1] > length:
        raise InputError(
            f"a mask of shape {list(mask.shape)} was given for a forward of [{batch}, {length}]; masks cover the "
            "expanded prompt"
        )
    mask = mask.repeat_interleave(batch // len(mask), 0)
    rest = mask.new_full((batch, length - mask.shape[1], *mask.shape[2:]), fill)
    return torch.cat((mask, rest), 1)
