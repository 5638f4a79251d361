"""Attention temperature by place: layers that multiply a query by a factor that grows with its place in the sequence.

Such an attention counts the places of the states that it is given, which are fewer in a shortened sequence. Its queries
are multiplied by what then lacks: a token keeps its place, under either position policy. Later steps lack nothing,
since the cache tells the true length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.engine.calls.interception import shadowed
from tokenprune.engine.calls.wrappers import uncompiled
from tokenprune.engine.decoder import scales_by_place
from tokenprune.engine.sequence.gathered import GatheredSequence


def lacking_scale(attention: Any, frame: GatheredSequence | None) -> Tensor | None:
    """What the queries of an attention module lack on a shortened sequence: float32 [batch, M, 1]; None = nothing."""
    if frame is None or not scales_by_place(attention):
        return None
    places = frame.on_host.index
    counted = torch.arange(places.shape[1], device=places.device)
    lacking = _factor(attention, places) / _factor(attention, counted)
    return lacking[..., None] if bool((lacking != 1).any()) else None


def _factor(attention: Any, places: Tensor) -> Tensor:
    steps = torch.floor((places + 1.0) / attention.floor_scale)
    factor: Tensor = 1.0 + attention.attn_scale * torch.log1p(steps)
    return factor


@contextmanager
def scaled_queries(attention: nn.Module, lacking: Tensor | None) -> Iterator[None]:
    """The queries that an attention module projects are multiplied by `lacking` while the context is open."""
    if lacking is None:
        yield
        return
    projection: Any = attention.q_proj
    with shadowed(uncompiled(projection), "forward", partial(_scaled, lacking)):
        yield


def _scaled(lacking: Tensor, project: Callable[..., Tensor], *args: Any) -> Tensor:
    queries = project(*args)
    return (queries * lacking.to(queries.device)).to(queries.dtype)
