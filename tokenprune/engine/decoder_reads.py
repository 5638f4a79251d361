"""Reads of the decoder: attention, keys and position kernels, on the shortened sequence (frame) of a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenprune.core.layout import SequenceLayout
from tokenprune.core.reads import AttentionFrom, LayerKeys, PositionKernel, Read, TextKeys
from tokenprune.core.scheduling.state import take_rows
from tokenprune.engine.attention_tap import AttentionCall
from tokenprune.engine.gathered import GatheredSequence
from tokenprune.errors import EngineError, UnsupportedError


def from_layer(
    read: Read, seen: AttentionCall, layout: SequenceLayout, frame: GatheredSequence | None, active: Tensor
) -> Tensor:
    """The value of a read, from the queries and keys of a layer's attention.

    Args:
        read: AttentionFrom, LayerKeys or TextKeys.
        seen: queries and keys of the layer.
        layout: layout of the batch.
        frame: the shortened sequence that the layer ran on; None = the full one.
        active: bool [batch, N], the tokens that took part.

    Raises:
        EngineError: a query row was pruned.
    """
    seen = seen.of_prompt()
    if isinstance(read, (LayerKeys, TextKeys)):
        averaged = isinstance(read, LayerKeys) and read.heads == "mean"
        keys = seen.key.mean(1) if averaged else seen.key.transpose(1, 2).flatten(2)
        slots = layout.slots if isinstance(read, LayerKeys) else layout.text_slots
        return _at(keys, places(slots, frame)).to(slots.device)
    assert isinstance(read, AttentionFrom)
    positions = layout.query_rows(read.query)
    weights = seen.attention(query_places(read.query, layout, frame))
    weights = weights.transpose(1, 2) if read.heads == "each" else weights.mean(1)  # [batch, Q, (heads,) K]
    weights = _reduced(weights, positions >= 0, read.reduce)
    where = places(layout.slots, frame)
    index = where.clamp(min=0).to(weights.device)
    index = index.reshape(len(index), *[1] * (weights.dim() - 2), -1).expand(*weights.shape[:-1], -1)
    # −inf, so that a token that did not take part is never chosen by score
    hidden = ~active | (where < 0)
    taken = weights.gather(-1, index).to(where.device)  # −1 gathers column 0, masked next
    taken = taken.masked_fill(hidden.reshape(len(index), *[1] * (taken.dim() - 2), -1), float("-inf"))
    return taken.transpose(1, 2) if read.heads == "each" and read.reduce == "each" else taken


def position_kernel(
    read: PositionKernel,
    tables: tuple[Tensor, ...],
    scaling: float,
    layout: SequenceLayout,
    frame: GatheredSequence | None,
) -> Tensor:
    """float32 [batch, Q, N], see `PositionKernel`.

    Args:
        read: the read, which names the query row.
        tables: cos and sin at the current positions, [batch or 1, M, D].
        scaling: factor on query · key.
        layout: layout of the batch.
        frame: the current shortened sequence; None = the full one.
    """
    rows = query_places(read.query, layout, frame)
    tokens = places(layout.slots, frame)
    kernel = torch.zeros(*rows.shape, tokens.shape[1], device=tokens.device)
    for table in tables:
        if table.dim() != 3:
            raise UnsupportedError("PositionKernel is not defined for rotary embeddings with several axes")
        # cos a · cos b + sin a · sin b = cos (a − b), summed over channels
        full = table.float().expand(len(rows), -1, -1)
        kernel += (_at(full, rows) @ _at(full, tokens).transpose(1, 2)).to(kernel.device)
    return kernel * scaling


def places(positions: Tensor, frame: GatheredSequence | None) -> Tensor:
    """Indices of full-sequence positions in a frame, −1 if they are not in it."""
    return positions if frame is None else frame.places(positions)


def query_places(name: str, layout: SequenceLayout, frame: GatheredSequence | None) -> Tensor:
    """Indices of the query rows `name` in a frame, −1 for none. Raises EngineError if one was pruned."""
    positions = layout.on_host.query_rows(name)
    rows = places(positions, None if frame is None else frame.on_host)
    if bool(((positions >= 0) & (rows < 0)).any()):
        raise EngineError(f"query row {name!r} is an image token that was pruned; mark a text position instead")
    return rows.to(layout.valid.device, non_blocking=True)


def _at(values: Tensor, index: Tensor) -> Tensor:
    """Values [batch, M, C] at [batch, n]: [batch, n, C], zeros at −1."""
    index = index.to(values.device)
    return take_rows(values, index.clamp(min=0)).masked_fill((index < 0)[..., None], 0)


def _reduced(weights: Tensor, real: Tensor, how: str) -> Tensor:
    """Reduce [batch, Q, …, K] over real query rows to [batch, …, K]; "each" keeps Q, with zeros in the other rows."""
    real = real.to(weights.device).reshape(*real.shape, *[1] * (weights.dim() - 2))
    weights = weights.masked_fill(~real, 0)  # rows of padding may contain NaN
    if how == "max":
        return weights.masked_fill(~real, float("-inf")).amax(1)
    return weights if how == "each" else weights.sum(1) / real.sum(1)
