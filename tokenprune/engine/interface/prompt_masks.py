"""Masks over the input of a prefill, from the caller or an adapter: image tokens, query rows, grid cells, padding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tokenprune.core.layout import SequenceLayout
from tokenprune.errors import InputError
from tokenprune.utils.host_copies import on_host


@dataclass(frozen=True)
class PromptMasks:
    """Masks over the expanded prompt; all [batch, prompt].

    Attributes:
        image_tokens: bool, True on image tokens.
        queries: named query rows, bool each.
        grid: int64 [batch, prompt, 2], grid cells of the image tokens; None = square images in row-major order.
        image_number: int64; None = consecutive image tokens form one image.
        attention_mask: 0 on padding; None = the decoder's own argument.
        drafted: bool, True on the tokens of an expected answer after the prompt, see `SequenceLayout.drafted`.
        source: who created the masks, for messages; empty = the caller.
        shared: how many columns from a row's first token on are the same in all rows, as those of several prompts about
            one image are; they are computed once where that is possible, see `SharedPrefix`.
    """

    image_tokens: Tensor
    queries: Mapping[str, Tensor] = field(default_factory=dict)
    grid: Tensor | None = None
    image_number: Tensor | None = None
    attention_mask: Tensor | None = None
    drafted: Tensor | None = None
    source: str = ""
    shared: int = 0

    def layout(self, hidden: Tensor, attention_mask: Tensor | None) -> SequenceLayout:
        """The layout of a prefill.

        Args:
            hidden: [batch, sequence, width], the decoder's input.
            attention_mask: [batch, total], the decoder's own mask, if it is two-dimensional.

        Raises:
            InputError: masks that do not match the input.
        """
        masks, (attention_mask,) = self.on_host(attention_mask)
        return masks._layout(hidden, attention_mask).to(hidden.device)

    def on_host(self, *others: Tensor | None) -> tuple[PromptMasks, list[Any]]:
        """These masks, and other tensors, in the host's memory: copied together, since the host waits for each copy."""
        names = ("image_tokens", "grid", "image_number", "attention_mask", "drafted")
        given = [*others, *(getattr(self, name) for name in names), *self.queries.values()]
        copies = iter(on_host(*(one for one in given if isinstance(one, Tensor))))
        found = [next(copies) if isinstance(one, Tensor) else one for one in given]
        first, queries = len(others), len(others) + len(names)
        own: dict[str, Any] = dict(zip(names, found[first:queries], strict=True))
        rows = dict(zip(self.queries, found[queries:], strict=True))
        return replace(self, **own, queries=rows), found[:first]

    def _layout(self, hidden: Tensor, attention_mask: Tensor | None) -> SequenceLayout:
        batch, length = hidden.shape[:2]

        def fit(name: str, mask: Tensor, fill: int) -> Tensor:
            _check(name, mask)
            return _fit(name, mask, batch, length, fill)

        def optional(name: str, values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            fitted = fit(name, values, -1)
            if values.shape[:2] != self.image_tokens.shape:
                wanted = list(self.image_tokens.shape)
                raise InputError(f"{name}: found {list(values.shape[:2])}, expected {wanted} like image_tokens")
            return fitted

        queries = {name: fit(f"query row {name!r}", rows, 0) for name, rows in self.queries.items()}
        try:
            image_tokens, mask = fit("image_tokens", self.image_tokens, 0), attention_mask
            if self.attention_mask is not None:
                _check("attention_mask", self.attention_mask)
                mask = _repeated(self.attention_mask, batch)
            return SequenceLayout.from_mask(
                image_tokens,
                None if mask is None else mask[:, -length:],  # a mask over all tokens ends with the current ones
                grid=optional("grid", self.grid),
                image_number=optional("image_number", self.image_number),
                queries=queries,
                drafted=None if self.drafted is None else fit("drafted", self.drafted, 0),
            )
        except InputError as error:
            if not self.source:
                raise
            raise InputError(f"{self.source}: {error}") from error


def _check(name: str, mask: object) -> None:
    """Raise InputError if a mask has not the shape and dtype that `PromptMasks` documents."""
    numbers = {"grid": "int64 [batch, prompt, 2]", "image_number": "int64 [batch, prompt]"}
    expected = numbers.get(name, "bool [batch, prompt]")
    if not isinstance(mask, Tensor):
        raise InputError(f"{name}: found {type(mask).__name__}, expected {expected}")
    fits = mask.dim() == 3 and mask.shape[-1] == 2 if name == "grid" else mask.dim() == 2
    if name in numbers:
        fits = fits and not (mask.is_floating_point() or mask.is_complex() or mask.dtype == torch.bool)
    elif name != "attention_mask" and mask.dtype != torch.bool and mask.device.type != "meta":
        # zeros and ones are accepted; positions and scores are not
        fits = fits and bool(((mask == 0) | (mask == 1)).all())
    if not fits or mask.device.type == "meta":
        found = f"{list(mask.shape)} {str(mask.dtype).removeprefix('torch.')} on {mask.device}"
        raise InputError(f"{name}: found {found}, expected {expected}")


def _repeated(mask: Tensor, batch: int) -> Tensor:
    """A mask for all rows: `generate` places the copies of a row (beams, returned sequences) next to each other."""
    repeats = batch // max(len(mask), 1)
    return mask.repeat_interleave(repeats, 0) if len(mask) * repeats == batch else mask


def _fit(name: str, mask: Tensor, batch: int, length: int, fill: int) -> Tensor:
    """A mask over the prompt, repeated for returned sequences and extended over tokens generated without a cache."""
    if not len(mask) or batch % len(mask) or mask.shape[1] > length:
        raise InputError(
            f"{name}: the mask of shape {list(mask.shape)} does not match a forward of [{batch}, {length}]; masks "
            "cover the expanded prompt"
        )
    mask = _repeated(mask, batch)
    rest = mask.new_full((batch, length - mask.shape[1], *mask.shape[2:]), fill)
    return torch.cat((mask, rest), 1)
