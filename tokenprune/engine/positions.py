"""Positions renumbered: rotary tables and ids as of a sequence without the tokens that were pruned."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from tokenprune.engine.decoder import Decoder
from tokenprune.errors import UnsupportedError


def tables_of(kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Rotary tables (cos, sin) among a layer's keyword arguments.

    Raises:
        UnsupportedError: there are none.
    """
    tables = kwargs.get("position_embeddings")
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


def fresh_rotary(rotary: nn.Module) -> nn.Module:
    """A rotary module that has seen no sequence yet, where what it gives depends on those that it has seen.

    Dynamic NTK scaling keeps the frequencies of the longest sequence so far, and LongRoPE overwrites its own: on the
    model's module a shortened sequence would get the tables of the full one, and the model would be left changed.
    Other kinds of scaling (linear, YaRN, Llama 3) are the same for every length; their module is given back itself.
    """
    kinds: Any = getattr(rotary, "rope_type", "default")
    kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
    if not any("dynamic" in kind or kind == "longrope" for kind in kinds):
        return rotary
    fresh: Any = copy.copy(rotary)
    fresh.__dict__.pop("forward", None)  # as accelerate puts it there, it would run the model's own
    buffers = {name: None if own is None else own.clone() for name, own in rotary.named_buffers(recurse=False)}
    fresh.__dict__["_buffers"] = buffers
    for name in [name for name in buffers if name.endswith("inv_freq") and "original" not in name]:
        original: Tensor = getattr(rotary, f"{name.removesuffix('inv_freq')}original_inv_freq")
        buffers[name] = original.clone()
    for name in [name for name in fresh.__dict__ if name.endswith("max_seq_len_cached")]:
        fresh.__dict__[name] = rotary.original_max_seq_len
    return fresh  # type: ignore[no-any-return]


def new_tables(decoder: Decoder, layer: int, hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary tables (cos, sin) [batch, n, D] that a sequence of these positions alone has in a layer.

    Args:
        decoder: whose rotary module is left as it is.
        layer: its number.
        hidden: for type and device.
        ids: int64 [batch, n], or [batch, 1] of a step.
    """
    return decoder.tables(layer, hidden, ids, fresh_rotary(decoder.rotary))


def new_or_kept(length: Tensor, new: Tensor, kept: Tensor) -> Tensor:
    """The new values in rows whose positions were renumbered, the kept ones in the others.

    Args:
        length: int64 [batch], −1 in rows whose positions are the model's.
        new: [batch, …].
        kept: [batch or 1, …].
    """
    rows = (length >= 0).to(new.device)
    # no copy where every row is renumbered, as always but in batches with position policies that differ
    return new if bool(rows.all()) else torch.where(rows.reshape(-1, *[1] * (new.dim() - 1)), new, kept.to(new))


def first_tables(tables: tuple[Tensor, ...], valid: Tensor) -> tuple[Tensor, ...] | None:
    """Rotary tables [..., batch, 1, D] of each row's first real token; None where all rows begin at position 0.

    Args:
        tables: cos and sin, [..., batch or 1, S, D].
        valid: bool [batch, S], False on padding.
    """
    first = valid.int().argmax(1)[:, None, None]
    taken = []
    for table in tables:
        table = table.expand(*table.shape[:-3], len(valid), *table.shape[-2:])
        where = first.to(table.device).expand(*table.shape[:-2], 1, table.shape[-1])
        taken.append(table.gather(-2, where))
    return tuple(taken) if bool(taken[1].any()) else None  # sin 0 = 0: nothing to turn back


def moved_back(tables: tuple[Tensor, ...], first: tuple[Tensor, ...], length: Tensor | None) -> tuple[Tensor, ...]:
    """Rotary tables at positions counted from those of `first`: the angle of each channel less than that one's.

    Args:
        tables: cos and sin, [..., batch, M, D].
        first: the same of one position, [..., batch, 1, D].
        length: int64 [batch], not −1 in rows whose positions were renumbered, from 0; None = in no row.
    """
    (cos, sin), (away, up) = ([table.float() for table in pair] for pair in (tables, first))
    scale = torch.hypot(away, up)  # tables may carry a factor on the attention
    if length is not None:
        # renumbered rows begin at 0 already: turn those by no angle
        away, up = new_or_kept(length, scale, away), new_or_kept(length, torch.zeros_like(up), up)
    # cos (a − b) and sin (a − b) of the two angles; dividing by the scale leaves one factor of the two
    turned = (cos * away + sin * up) / scale, (sin * away - cos * up) / scale
    return tuple(new.to(table) for new, table in zip(turned, tables, strict=True))


def since_prefill(mask: Tensor | None, length: int, past: int, new: int) -> Tensor:
    """int64 [batch or 1, new]: how many tokens after the prefill each new one is, from 0, padding not counted.

    Args:
        mask: 0 on padding, [batch, total], of prefill and all that came after it; None = there is no padding.
        length: S, positions of the prefill, padding included.
        past: tokens decoded before this step, padding included.
        new: tokens of this step.
    """
    if mask is None:
        return torch.arange(past, past + new)[None]
    real = mask[:, length : length + past + new].bool()
    real = pad(real, (0, past + new - real.shape[1]))  # as transformers takes a mask that is too short
    # padding before the first new token has no number of its own, and needs one that the tables know
    return (real.long().cumsum(1) - 1).clamp(min=0)[:, past:]


def renumber_step(
    decoder: Decoder, layer: int, hidden: Tensor, kwargs: dict[str, Any], length: Tensor, since: Tensor
) -> None:
    """Give a decoding step the positions that follow those renumbered; `kwargs` is changed in place.

    Args:
        decoder: the decoder.
        layer: its number.
        hidden: [batch, new, width], what enters the layer.
        kwargs: the layer's keyword arguments.
        length: int64 [batch], positions of the prefill, −1 in rows where they were not renumbered.
        since: int64 [batch or 1, new], as `since_prefill` gives it.
    """
    ids = length.to(hidden.device)[:, None] + since.to(hidden.device)
    # −1 + since may be −1 in rows that keep the model's positions; what is made there is not used
    tables = zip(new_tables(decoder, layer, hidden, ids.clamp(min=0)), kwargs["position_embeddings"], strict=True)
    kwargs["position_embeddings"] = tuple(new_or_kept(length, new, kept) for new, kept in tables)
    kept = kwargs.get("position_ids")
    kwargs["position_ids"] = ids if kept is None else new_or_kept(length, ids, kept)
