"""Values of reads, from what a layer sees on its shortened sequence (frame)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from tokenprune.core.layout import SequenceLayout
from tokenprune.core.reads import (
    AttentionFrom,
    LayerKeys,
    LayerRead,
    LayerValues,
    LayerView,
    PositionKernel,
    Read,
    TextKeys,
    TextValues,
)
from tokenprune.core.reads.own import at_columns
from tokenprune.core.scheduling.state import as_mask
from tokenprune.engine.reads.attention_tap import AttentionCall
from tokenprune.engine.sequence.gathered import GatheredSequence
from tokenprune.errors import EngineError, PluginError, UnsupportedError
from tokenprune.plugins.attribution import blamed
from tokenprune.plugins.readonly import ReadOnlyTensors


def from_layer(
    read: Read,
    seen: AttentionCall,
    layout: SequenceLayout,
    frame: GatheredSequence | None,
    active: Tensor,
    states: Tensor | None = None,
) -> Tensor:
    """The value of a read, from the queries, keys and values of a layer's attention.

    Args:
        read: AttentionFrom, LayerKeys, TextKeys, LayerValues, TextValues or a LayerRead.
        seen: queries, keys and values of the layer.
        layout: layout of the batch.
        frame: the shortened sequence that the layer ran on; None = the full one.
        active: bool [batch, N], the tokens that took part.
        states: [batch, M, width], the layer's input, for a LayerRead.

    Raises:
        EngineError: a query row was pruned.
        PluginError: a LayerRead failed, or gave something of another shape.
    """
    seen = seen.of_prompt()
    if not isinstance(read, AttentionFrom):
        seen = seen.of_turn()
    if isinstance(read, LayerRead):
        return _own(read, seen, layout, frame, active, states)
    if isinstance(read, (LayerKeys, TextKeys, LayerValues, TextValues)):
        part = seen.key if isinstance(read, (LayerKeys, TextKeys)) else seen.value
        heads = "joint" if isinstance(read, TextKeys) else read.heads
        each = part.transpose(1, 2)
        values = each.mean(2) if heads == "mean" else each.flatten(2) if heads == "joint" else each
        slots = layout.slots if isinstance(read, (LayerKeys, LayerValues)) else layout.text_slots
        return at_columns(values, places(slots, frame)).to(slots.device)
    assert isinstance(read, AttentionFrom)
    positions = layout.query_rows(read.query)
    where = places(layout.slots, frame)
    # −inf, so that a token that did not take part is never chosen by score
    hidden = ~active | (where < 0)
    where = where + seen.earlier
    among = None if read.keys == "all" else as_mask(where.masked_fill(hidden, -1), seen.key.shape[2])
    weights = seen.attention(query_places(read.query, layout, frame), among)
    weights = weights.transpose(1, 2) if read.heads == "each" else weights.mean(1)  # [batch, Q, (heads,) K]
    weights = _reduced(weights, positions >= 0, read.reduce)
    index = where.clamp(min=0).to(weights.device)
    index = index.reshape(len(index), *[1] * (weights.dim() - 2), -1).expand(*weights.shape[:-1], -1)
    taken = weights.gather(-1, index).to(where.device)  # −1 gathers column 0, masked next
    taken = taken.masked_fill(hidden.reshape(len(index), *[1] * (taken.dim() - 2), -1), float("-inf"))
    return taken.transpose(1, 2) if read.heads == "each" and read.reduce == "each" else taken


def _own(
    read: LayerRead,
    seen: AttentionCall,
    layout: SequenceLayout,
    frame: GatheredSequence | None,
    active: Tensor,
    states: Tensor | None,
) -> Tensor:
    """The value of a plugin's read, checked."""
    assert states is not None
    view = LayerView(
        states.detach(),
        seen.query,
        seen.key,
        seen.value,
        seen.scaling,
        places(layout.slots, frame).masked_fill(~active, -1),
        places(layout.text_slots, frame).clone(),
        partial(query_places, layout=layout, frame=frame),
    )
    shown = ReadOnlyTensors()
    for name in ("states", "query", "key", "value"):
        shown.add(name, getattr(view, name))
    with blamed(lambda brief: PluginError(f"read {read}: value() raised {brief}")):
        value: object = read.value(view)
    if (written := shown.written()) is not None:
        raise PluginError(f"read {read}: value() modified layer.{written} in place; work on layer.{written}.clone()")
    if isinstance(value, Tensor) and (read.axis is None or _is_aligned(value, read.axis, active.shape)):
        return value.to(active.device)
    found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
    batch, tokens = active.shape
    raise PluginError(
        f"read {read}: value() gave {found}; expected [batch = {batch}, N = {tokens}, …], image tokens on axis "
        f"{read.axis} (layer.of_image(…) selects them; set axis = None if there are none)"
    )


def _is_aligned(value: Tensor, axis: int, shape: torch.Size) -> bool:
    return -value.dim() <= axis < value.dim() > 1 and (len(value), value.shape[axis]) == tuple(shape)


def rotary_tables(
    tables: tuple[Tensor, ...], layout: SequenceLayout, frame: GatheredSequence | None, active: Tensor
) -> Tensor:
    """float32 [batch, N, axes, 2, D], see `RotaryTables`.

    Args:
        tables: cos and sin at the current positions, [(axes,) batch or 1, M, D].
        layout: layout of the batch.
        frame: the current shortened sequence; None = the full one.
        active: bool [batch, N].
    """
    columns = places(layout.slots, frame).masked_fill(~active, -1)
    both = torch.stack([table.float() for table in tables], -2)  # [(axes,) batch or 1, M, 2, D]
    axes = both if both.dim() == 5 else both[None]
    axes = axes.expand(-1, len(columns), -1, -1, -1).permute(1, 2, 0, 3, 4)
    return at_columns(axes, columns).to(columns.device)


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
        kernel += (at_columns(full, rows) @ at_columns(full, tokens).transpose(1, 2)).to(kernel.device)
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


def _reduced(weights: Tensor, real: Tensor, how: str) -> Tensor:
    """Reduce [batch, Q, …, K] over real query rows to [batch, …, K]; "each" keeps Q, with zeros in the other rows."""
    real = real.to(weights.device).reshape(*real.shape, *[1] * (weights.dim() - 2))
    weights = weights.masked_fill(~real, 0)  # rows of padding may contain NaN
    if how == "max":
        return weights.masked_fill(~real, float("-inf")).amax(1)
    return weights if how == "each" else weights.sum(1) / real.sum(1)
