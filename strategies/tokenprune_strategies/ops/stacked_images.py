"""The images of a batch stacked in one tensor, for methods that compare the tokens of an image with each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tokenprune.core.tokens import ImageTokens, Tokens


@dataclass(frozen=True, eq=False)
class StackedImages:
    """The active tokens of all G images (or crops, or parts of them) of a batch, padded to the largest.

    Attributes:
        rows: int64 [G], the batch row of each.
        index: int64 [G, n], image-token numbers within the row, −1 as padding.
        quotas: int64 [G], number of tokens to keep in each, in the host's memory.
    """

    rows: Tensor
    index: Tensor
    quotas: Tensor

    @classmethod
    def of(cls, tokens: Tokens, parts: Sequence[ImageTokens] | None = None) -> StackedImages:
        """Of these parts, by default of `tokens.images()`."""
        images = tokens.images() if parts is None else parts
        if not images:
            none = torch.empty(0, dtype=torch.int64)
            return cls(tokens.counts[:0], tokens.image[:0], none)
        index = pad_sequence([image.index_on_host for image in images], batch_first=True, padding_value=-1)
        rows, quotas = (torch.tensor([getattr(image, name) for image in images]) for name in ("row", "quota"))
        rows, index = (part.to(tokens.device, non_blocking=True) for part in (rows, index))
        return cls(rows, index, quotas)

    @property
    def exists(self) -> Tensor:
        """bool [G, n]: False on padding."""
        return self.index >= 0

    def take(self, values: Tensor) -> Tensor:
        """Values [batch, N, …] of the tokens: [G, n, …]; undefined on padding."""
        return values[self.rows[:, None], self.index.clamp(min=0)]

    def picked(self, picks: Tensor) -> list[Tensor]:
        """Image-token numbers of picks, int64 [G, k], which are indices within each image, −1 as padding."""
        return [index[own[own >= 0]] for index, own in zip(self.index, picks, strict=True)]

    def mask(self, picks: Tensor, tokens: Tokens) -> Tensor:
        """The picks as bool [batch, N]."""
        batch, size = tokens.exists.shape
        chosen = torch.zeros(batch, size + 1, dtype=torch.bool, device=tokens.device)  # the last column is for −1
        numbers = torch.where(picks < 0, size, self.index.gather(1, picks.clamp(min=0)))
        chosen[self.rows[:, None], numbers] = True
        return chosen[:, :size]

    def spread(self, values: Tensor, tokens: Tokens) -> Tensor:
        """Float values [G, n] of the tokens as [batch, N], with −inf where there are none."""
        batch, size = tokens.exists.shape
        result = values.new_full((batch, size + 1), float("-inf"))  # the last column is for padding
        result[self.rows[:, None], self.index.where(self.index >= 0, size)] = values
        return result[:, :size]


def halves(images: Sequence[ImageTokens]) -> list[ImageTokens]:
    """The first ⌊n/2⌋ tokens of each image and the rest, with half of its quota each; of an odd one the first gets one
    more, where it has as many (ours: OpenVINO GenAI keeps an even number)."""
    parts = []
    for image in images:
        middle = len(image) // 2
        first = min(middle, (image.quota + 1) // 2)
        for part, quota in ((slice(middle), first), (slice(middle, None), image.quota - first)):
            index, on_host = image.index[part], image.index_on_host[part]
            parts.append(replace(image, index=index, index_on_host=on_host, quota=quota))
    return [part for part in parts if len(part)]
