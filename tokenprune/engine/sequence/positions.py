"""Renumbered positions: rotary tables and position ids of a sequence without the pruned tokens."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from tokenprune.engine.decoder import Decoder
from tokenprune.errors import UnsupportedError


def tables_of(kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Rotary tables among a layer's keyword arguments: cos and sin, or one complex table.

    Raises:
        UnsupportedError: the layer has none.
    """
    tables = kwargs.get("position_embeddings")
    if isinstance(tables, Tensor) and tables.is_complex():
        return (tables,)
    if (
        isinstance(tables, tuple)
        and len(tables) == 2
        and isinstance(tables[0], Tensor)
        and isinstance(tables[1], Tensor)
    ):
        return tables
    raise UnsupportedError(
        "the decoder layers do not take position_embeddings=(cos, sin), which the engine has to shorten"
    )


def for_layer(tables: tuple[Tensor, ...]) -> tuple[Tensor, ...] | Tensor | None:
    """Rotary tables as the layers take them: undoes `tables_of`."""
    if len(tables) == 2:
        return tables
    return tables[0] if tables else None


def cos_and_sin(tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Cos and sin for each channel of rotary tables; those of a complex number turn two channels that follow."""
    if len(tables) == 1:
        cos, sin = (part.repeat_interleave(2, -1) for part in (tables[0].real, tables[0].imag))
    else:
        cos, sin = tables
    return cos, sin


def _in_form_of(tables: tuple[Tensor, ...], cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """Undo `cos_and_sin`."""
    return (cos, sin) if len(tables) == 2 else (torch.complex(cos[..., ::2], sin[..., ::2]),)


def fresh_rotary(rotary: nn.Module) -> nn.Module:
    """A copy of a rotary module in its initial state, if its output depends on earlier sequences; else the module.

    Dynamic NTK scaling keeps the frequencies of the longest sequence so far, and LongRoPE overwrites its own: the
    model's module would give a shortened sequence the tables of the full one, and would itself be changed. Other kinds
    of scaling (linear, YaRN, Llama 3) do not depend on the length.
    """
    kinds: Any = getattr(rotary, "rope_type", "default")
    kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
    if not any("dynamic" in kind or kind == "longrope" for kind in kinds):
        return rotary
    fresh: Any = copy.copy(rotary)
    fresh.__dict__.pop("forward", None)  # a hook of accelerate would run the model's module
    buffers = {name: None if own is None else own.clone() for name, own in rotary.named_buffers(recurse=False)}
    fresh.__dict__["_buffers"] = buffers
    for name in [name for name in buffers if name.endswith("inv_freq") and "original" not in name]:
        original: Tensor = getattr(rotary, f"{name.removesuffix('inv_freq')}original_inv_freq")
        buffers[name] = original.clone()
    for name in [name for name in fresh.__dict__ if name.endswith("max_seq_len_cached")]:
        fresh.__dict__[name] = rotary.original_max_seq_len
    return fresh  # type: ignore[no-any-return]


def new_tables(decoder: Decoder, layer: int, hidden: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    """Rotary tables [batch, n, D] of a layer for a sequence with these positions.

    Args:
        decoder: the decoder; its rotary module is not changed.
        layer: the layer's number.
        hidden: for dtype and device.
        ids: int64 [batch, n].
    """
    return decoder.tables(layer, hidden, ids, fresh_rotary(decoder.rotary))


def where_renumbered(length: Tensor, new: Tensor, kept: Tensor) -> Tensor:
    """The new values in rows whose positions were renumbered, the kept ones in the others.

    Args:
        length: int64 [batch], −1 in rows that keep the model's positions.
        new: [batch, …].
        kept: [batch or 1, …].
    """
    # no shortcut where all rows are renumbered: to ask would make a GPU wait in every layer
    rows = (length >= 0).to(new.device).reshape(-1, *[1] * (new.dim() - 1))
    return torch.where(rows, new, kept.to(new))


def first_tables(tables: tuple[Tensor, ...], valid: Tensor) -> tuple[Tensor, ...] | None:
    """Rotary tables [..., batch, 1, D] of each row's first real token; None if all rows begin at position 0.

    Args:
        tables: [..., batch or 1, S, D].
        valid: bool [batch, S], False on padding.
    """
    first = valid.int().argmax(1)[:, None, None]
    taken = []
    for table in tables:
        table = table.expand(*table.shape[:-3], len(valid), *table.shape[-2:])
        where = first.to(table.device).expand(*table.shape[:-2], 1, table.shape[-1])
        taken.append(table.gather(-2, where))
    sin = taken[-1].imag if len(taken) == 1 else taken[1]
    return tuple(taken) if bool(sin.any()) else None  # sin 0 = 0


def no_rotation(tables: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Rotary tables with which queries and keys stay as they were projected."""
    cos, sin = cos_and_sin(tables)
    return _in_form_of(tables, torch.ones_like(cos), torch.zeros_like(sin))


def shifted_tables(tables: tuple[Tensor, ...], first: tuple[Tensor, ...], length: Tensor | None) -> tuple[Tensor, ...]:
    """Rotary tables shifted so that the position of `first` becomes 0: its angle is subtracted in each channel.

    Args:
        tables: [..., batch, M, D].
        first: of one position, [..., batch, 1, D].
        length: int64 [batch], −1 in rows that were not renumbered; None = no row was.
    """
    own = cos_and_sin(tables)
    (cos, sin), (away, up) = ([table.float() for table in pair] for pair in (own, cos_and_sin(first)))
    scale = torch.hypot(away, up)  # tables may include an attention scaling factor
    if length is not None:
        # renumbered rows already begin at 0
        away, up = where_renumbered(length, scale, away), where_renumbered(length, torch.zeros_like(up), up)
    # cos (a − b) and sin (a − b); the product has the factor twice, so divide by it once
    turned = (cos * away + sin * up) / scale, (sin * away - cos * up) / scale
    return _in_form_of(tables, *(new.to(table) for new, table in zip(turned, own, strict=True)))


def since_prefill(mask: Tensor | None, length: int, past: int, new: int) -> Tensor:
    """int64 [batch or 1, new]: for each new token, the number of tokens since the prefill, from 0, without padding.

    Args:
        mask: 0 on padding, [batch, total], over the prefill and all later tokens; None = no padding.
        length: S, positions of the prefill, padding included.
        past: tokens decoded before this step, padding included.
        new: tokens in this step.
    """
    if mask is None:
        return torch.arange(past, past + new)[None]
    real = mask[:, length : length + past + new].bool()
    real = pad(real, (0, past + new - real.shape[1]))  # as transformers extends a mask that is too short
    # padding before the first token needs any valid number
    return (real.long().cumsum(1) - 1).clamp(min=0)[:, past:]


def renumber_step(
    decoder: Decoder, layer: int, hidden: Tensor, kwargs: dict[str, Any], length: Tensor, since: Tensor
) -> None:
    """Renumber the positions of a decoding step after a renumbered prefill; `kwargs` is changed in place.

    Args:
        decoder: the decoder.
        layer: the layer's number.
        hidden: [batch, new, width], the layer's input.
        kwargs: the layer's keyword arguments.
        length: int64 [batch], number of positions of the prefill, −1 in rows that were not renumbered.
        since: int64 [batch or 1, new], from `since_prefill`.
    """
    ids = length.to(hidden.device)[:, None] + since.to(hidden.device)
    # clamped, since −1 + since may be −1 in rows that keep the model's positions, where the result is not used
    tables = zip(new_tables(decoder, layer, hidden, ids.clamp(min=0)), tables_of(kwargs), strict=True)
    kwargs["position_embeddings"] = for_layer(tuple([where_renumbered(length, new, kept) for new, kept in tables]))
    kept = kwargs.get("position_ids")
    kwargs["position_ids"] = ids if kept is None else where_renumbered(length, ids, kept)
