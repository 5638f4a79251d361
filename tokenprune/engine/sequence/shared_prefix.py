"""The first tokens of a batch, which all rows have in common, computed once instead of in each row.

Several queries about one image are such rows: with causal attention, the states of the image do not depend on the text
behind it. Each layer runs twice: on the prefix of one row, then on the rest of all rows, whose queries attend to the
prefix's keys too. The result is that of one run up to rounding, since a matrix product of another size adds up in
another order.

Whether the rows agree is compared, not assumed: when the prefill begins, and after each stage, which may choose by the
text. From the first difference on, rows are computed whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from tokenprune.engine.calls.interception import is_compiled_run
from tokenprune.engine.calls.torch_compile import hooks_on
from tokenprune.engine.decoder import Decoder
from tokenprune.engine.sequence.gathered import GatheredSequence, visible
from tokenprune.engine.sequence.positions import for_layer, tables_of

_SPLIT = {"attention_mask", "position_embeddings", "position_ids", "past_key_values"}


class SharedPrefix:
    """Runs the layers of one prefill, as long as the rows agree in their prefix.

    Args:
        decoder: the decoder.
        length: columns of the prompt, counted from the first token of a row, that are said to be the same in all rows.
        valid: bool [batch, S], False on padding.
    """

    def __init__(self, decoder: Decoder, length: int, valid: Tensor) -> None:
        self._decoder, self._first = decoder, valid.int().argmax(1)
        self._starts: list[int] = self._first.tolist()
        # every row has at least one column of its own, even if all are the same
        self._length = min(length, valid.shape[1] - max(self._starts) - 1)
        self._span: _Span | None = None
        self._fits: dict[tuple[int, ...], tuple[Any, bool]] = {}
        # a layer that keeps a state would have to hand it on to the rest of each row
        self._possible = (
            decoder.attention_name in ("sdpa", "eager")
            and not decoder.keeps_states
            and not (
                torch.is_grad_enabled() or decoder.module.training or is_compiled_run() or hooks_on(decoder.module)
            )
        )

    def stop(self) -> None:
        """Compute rows whole from now on, since other code may change their states."""
        self._possible, self._span = False, None

    def begin(self, hidden: Tensor, frame: GatheredSequence | None) -> None:
        """Compare the rows, in the first layer and in the first one of a stage.

        Args:
            hidden: [batch, M, width], the layer's input.
            frame: the shortened sequence that it runs on; None = the full one.
        """
        self._span = None
        self._fits.clear()
        if not self._possible:
            return
        if frame is None:
            first, widths = self._starts, [self._length]
        else:
            known = frame.on_host
            end = (self._first + self._length).to(known.index.device)[:, None]
            widths = list(set(((known.index < end) & known.filled).sum(1).tolist()))
            first = [0] * len(hidden)
        if len(widths) == 1 and 0 < widths[0] < hidden.shape[1] - max(first):
            span = _Span(first, widths[0], hidden.device)
            if _all_equal(span.every(hidden[None])):
                self._span = span
        self._possible = self._span is not None

    def run(self, layer: Callable[..., Any], number: int, hidden: Tensor, kwargs: dict[str, Any]) -> Any:
        """Call a layer: on the prefix and the rest, if the rows agree, else on the whole rows.

        Args:
            layer: the layer's forward.
            number: its number.
            hidden: [batch, M, width], its input.
            kwargs: its keyword arguments for this input.
        """
        span = self._span
        if span is None or not self._applies(span, number, kwargs):
            return layer(hidden, **kwargs)
        keys = _Keys(span, kwargs["past_key_values"])
        first = layer(span.own(hidden[None])[0], **{**kwargs, **span.own_arguments(kwargs), "past_key_values": keys})
        if keys.updates != 1:  # this layer uses caches in another way
            self.stop()
            return layer(hidden, **kwargs)
        rest = hidden[:, span.width :]
        second = layer(rest, **{**kwargs, **span.rest_arguments(kwargs, rest), "past_key_values": keys})
        if isinstance(first, tuple):
            return span.join(first[0], second[0]), *second[1:]
        return span.join(first, second)

    def _applies(self, span: _Span, number: int, kwargs: dict[str, Any]) -> bool:
        """Whether a layer's arguments can be split, and its prefix is the same in all rows."""
        if number in self._decoder.tempered:
            return False  # it would count the places of the rest from its first column
        others = (value for name, value in kwargs.items() if name not in _SPLIT)
        if "past_key_values" not in kwargs or any(isinstance(value, (Tensor, tuple)) for value in others):
            return False
        cache = kwargs["past_key_values"]
        layers = () if cache is None else getattr(cache, "layers", None)
        if layers is None or not all(isinstance(own, DynamicLayer) for own in layers[number : number + 1]):
            return False
        mask, tables = kwargs.get("attention_mask"), tables_of(kwargs)
        key = tuple(map(id, (mask, *tables)))
        if key not in self._fits:  # the layers of a stage receive the same tensors
            causal = self._causal(span, number, mask)
            self._fits[key] = (mask, tables), causal and all(_all_equal(span.every(table)) for table in tables)
        return self._fits[key][1]

    def _causal(self, span: _Span, number: int, mask: Tensor | None) -> bool:
        """Whether the prefix sees itself alone, and in the same way in all rows."""
        if mask is None:
            sdpa = self._decoder.attention_name == "sdpa"  # without a mask it is causal, others see everything
            return sdpa and bool(getattr(self._decoder.attention(number), "is_causal", True))
        if mask.dim() != 4:
            return False
        seen = span.every(mask.transpose(0, 1))  # [heads or 1, batch, P, T]
        columns = span.columns.to(mask.device)[None, :, None].expand(*seen.shape[:3], -1)
        inside = seen.gather(3, columns)
        outside = visible(seen).scatter(3, columns, False)
        return _all_equal(inside) and not bool(outside.any())


class _Span:
    """Where the prefix is in the sequence that a layer runs on.

    Args:
        first: of each row, the column in which the prefix begins.
        width: P, its number of columns.
        device: where the states are.

    Attributes:
        columns: int64 [batch, P], the columns of the prefix in every row.
    """

    def __init__(self, first: list[int], width: int, device: torch.device) -> None:
        self.width = width
        self._row = min(range(len(first)), key=first.__getitem__)
        start = first[self._row]
        self._part = slice(start, start + width)
        begin, steps = torch.tensor(first, device=device)[:, None], torch.arange(width, device=device)
        self.columns = begin + steps
        # of the first P columns of a row, which position of the prefix each has; padding before it repeats the first
        self._index = (steps - begin).clamp(min=0) if any(first) else None

    def every(self, values: Tensor) -> Tensor:
        """The prefix in every row: [..., batch or 1, S, D] -> [..., batch, P, D]."""
        columns = self.columns.to(values.device)
        values = values.expand(*values.shape[:-3], len(columns), *values.shape[-2:])
        return values.gather(-2, columns[..., None].expand(*values.shape[:-2], self.width, values.shape[-1]))

    def own(self, values: Tensor) -> Tensor:
        """The prefix once: [..., batch or 1, S, D] -> [..., 1, P, D]."""
        row = self._row if values.shape[-3] > 1 else 0
        return values[..., row : row + 1, self._part, :]

    def join(self, prefix: Tensor, rest: Tensor) -> Tensor:
        """The rows of a prefix [1, P, D] and of the columns after the first P, [batch, R, D]."""
        if self._index is None:
            return torch.cat((prefix.expand(len(rest), -1, -1), rest), 1)
        whole = torch.cat((prefix[0][self._index.to(prefix.device)], rest), 1)
        # behind padding, the rest has its end too, from a product of another size: all rows get the same states
        columns = self.columns.to(whole.device)[..., None].expand(-1, -1, whole.shape[2])
        return whole.scatter(1, columns, prefix.expand_as(columns))

    def own_arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A layer's arguments for the prefix."""
        mask, ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
        return {
            "attention_mask": None if mask is None else self.own(mask.transpose(0, 1)).transpose(0, 1)[..., self._part],
            "position_embeddings": for_layer(tuple(map(self.own, tables_of(kwargs)))),
            "position_ids": None if ids is None else self.own(ids[..., None])[..., 0],
        }

    def rest_arguments(self, kwargs: dict[str, Any], rest: Tensor) -> dict[str, Any]:
        """A layer's arguments for the columns after the first P."""
        mask, ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if mask is None:  # sdpa would align the queries with the first keys
            rows = rest.shape[1]
            mask = torch.ones(1, 1, rows, self.width + rows, dtype=torch.bool, device=rest.device).tril(self.width)
        else:
            mask = mask[:, :, self.width :]
        return {
            "attention_mask": mask,
            "position_embeddings": for_layer(tuple([table[..., self.width :, :] for table in tables_of(kwargs)])),
            "position_ids": None if ids is None else ids[..., self.width :],
        }


class _Keys:
    """Stands for the KV cache in the two calls of a layer: keeps the prefix's keys and values for the second one, and
    then fills the cache.

    Attributes:
        updates: how often the layer has called `update`.
    """

    def __init__(self, span: _Span, cache: Any) -> None:
        self._span, self._cache = span, cache
        self._prefix: tuple[Tensor, Tensor] | None = None
        self.updates = 0

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """See `transformers.Cache.update`."""
        self.updates += 1
        if self._prefix is None:
            self._prefix = keys, values
            return keys, values
        whole = [_joined(self._span, *pair) for pair in zip(self._prefix, (keys, values), strict=True)]
        if self._cache is None:
            return whole[0], whole[1]
        filled: tuple[Tensor, Tensor] = self._cache.update(*whole, *args, **kwargs)
        return filled


def _joined(span: _Span, prefix: Tensor, rest: Tensor) -> Tensor:
    """[1, heads, P, D] and [batch, heads, R, D] -> [batch, heads, P + R, D]."""
    flat = [part.transpose(1, 2).flatten(2) for part in (prefix, rest)]
    whole = span.join(*flat)
    return whole.view(*whole.shape[:2], rest.shape[1], -1).transpose(1, 2)


def _all_equal(rows: Tensor) -> bool:
    """Whether the rows of [..., batch, P, D] are the same."""
    return torch.equal(rows, rows[..., :1, :, :].expand_as(rows))
