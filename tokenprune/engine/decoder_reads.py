"""Reads of the decoder: attention, keys and position kernels, on the shortened sequence (frame) of a layer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from tokenprune.core.layout import SequenceLayout
from tokenprune.core.reads import AttentionFrom, LayerKeys, PositionKernel, Read, TextKeys
from tokenprune.engine.attention_tap import AttentionCall, tap
from tokenprune.engine.calls.interception import shadowed
from tokenprune.engine.calls.wrappers import uncompiled
from tokenprune.engine.decoder import Decoder
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
    if isinstance(read, (LayerKeys, TextKeys)):
        averaged = isinstance(read, LayerKeys) and read.heads == "mean"
        keys = seen.key.mean(1) if averaged else seen.key.transpose(1, 2).flatten(2)
        slots = layout.slots if isinstance(read, LayerKeys) else layout.text_slots
        return _at(keys, places(slots, frame)).to(slots.device)
    assert isinstance(read, AttentionFrom)
    positions = layout.query_rows(read.query)
    weights = seen.attention(_query_places(read.query, positions, frame))
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
    rows = _query_places(read.query, layout.query_rows(read.query), frame)
    tokens = places(layout.slots, frame)
    kernel = torch.zeros(*rows.shape, tokens.shape[1], device=tokens.device)
    for table in tables:
        if table.dim() != 3:
            raise UnsupportedError("PositionKernel is not defined for rotary embeddings with several axes")
        # cos a · cos b + sin a · sin b = cos (a − b), summed over channels
        full = table.float().expand(len(rows), -1, -1)
        kernel += (_at(full, rows) @ _at(full, tokens).transpose(1, 2)).to(kernel.device)
    return kernel * scaling


def look_ahead(decoder: Decoder, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> AttentionCall:
    """Queries and keys that a layer would compute from these states, with its own norm, projections and rotation.

    Values and output are not computed if their projections have the usual names.

    Args:
        decoder: the decoder.
        layer: the layer's number.
        hidden: [batch, M, width], states entering the layer.
        kwargs: the layer's keyword arguments for these states.

    Raises:
        UnsupportedError: the layer has no `input_layernorm` or readable attention.
    """
    block, attention = decoder.layers[layer], decoder.attention(layer)
    norm = getattr(block, "input_layernorm", None)
    if norm is None:
        raise UnsupportedError(f"{type(block).__name__} has no input_layernorm; its attention cannot be computed ahead")
    found: list[AttentionCall] = []
    names = ("attention_mask", "position_embeddings", "position_ids")
    placed = (weight.device for weight in attention.parameters() if weight.device.type != "meta")  # meta: offloaded
    device = next(placed, hidden.device)
    wanted = {name: _moved(kwargs[name], device) for name in names if name in kwargs}
    with ExitStack() as undo:
        undo.enter_context(torch.no_grad())
        undo.enter_context(tap({attention: found.append}, instead=_nothing))
        # values and output are not used: skip their projections
        for name in ("v_proj", "o_proj"):
            projection = getattr(attention, name, None)
            if projection is not None:
                undo.enter_context(shadowed(uncompiled(projection), "forward", _no_rows))
        attention(norm(hidden.to(device)), **wanted)
    return found[0]


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(_moved(part, device) for part in value)
    return value.to(device) if isinstance(value, Tensor) else value


def places(positions: Tensor, frame: GatheredSequence | None) -> Tensor:
    """Indices of full-sequence positions in a frame, −1 if they are not in it."""
    return positions if frame is None else frame.places(positions)


def _query_places(name: str, positions: Tensor, frame: GatheredSequence | None) -> Tensor:
    rows = places(positions, frame)
    if bool(((positions >= 0) & (rows < 0)).any()):
        raise EngineError(f"query row {name!r} is an image token that was pruned; mark a text position instead")
    return rows


def _at(values: Tensor, index: Tensor) -> Tensor:
    """Values [batch, M, C] at [batch, n]: [batch, n, C], zeros at −1."""
    index = index.to(values.device)
    taken = values.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, values.shape[-1]))
    return taken.masked_fill((index < 0)[..., None], 0)


def _reduced(weights: Tensor, real: Tensor, how: str) -> Tensor:
    """Reduce [batch, Q, …, K] over real query rows to [batch, …, K]; "each" keeps Q, with zeros in the other rows."""
    real = real.to(weights.device).reshape(*real.shape, *[1] * (weights.dim() - 2))
    weights = weights.masked_fill(~real, 0)  # rows of padding may contain NaN
    if how == "max":
        return weights.masked_fill(~real, float("-inf")).amax(1)
    return weights if how == "each" else weights.sum(1) / real.sum(1)


def _no_rows(project: Callable[..., Tensor], states: Tensor, *args: Any) -> Tensor:
    """Replaces a projection whose output is not needed: run it on no rows."""
    return project(states[:, :0], *args)


def _nothing(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """Replaces an attention function whose output is not needed."""
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None
