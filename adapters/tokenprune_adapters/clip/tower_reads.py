"""Reads of a tower: of a layer, from the queries, keys and values of its attention; of the states between layers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from tokenprune.engine.reads.attention_tap import AttentionCall

ROWS_AT_ONCE = 256  # attention rows computed at a time, to limit memory


def cls_attention(seen: AttentionCall, heads: str = "mean") -> Tensor:
    """float32 [images, P]: attention of [CLS], the first position, to the P patches.

    Args:
        seen: a layer's queries and keys, [CLS] first.
        heads: "mean" or "joint", see `tokenprune.core.reads.ClsAttention`.
    """
    if heads == "mean":
        first = torch.zeros(len(seen.query), 1, dtype=torch.int64, device=seen.query.device)
        return seen.attention(first)[:, :, 0, 1:].mean(1)
    query, every = seen.query[:, :, 0].flatten(1).float(), keys(seen)
    products: Tensor = torch.einsum("ic,ipc->ip", query, every) * query.shape[1] ** -0.5
    return products.softmax(1)[:, 1:]


def received_attention(seen: AttentionCall) -> Tensor:
    """float32 [images, P]: attention that each position receives, mean over heads and the query positions that see it.

    So several images in one sequence, each of which a mask shows to itself only, receive what they receive alone.
    """
    images, _, length, _ = seen.query.shape
    total = torch.zeros(images, seen.key.shape[2], device=seen.query.device)
    viewers = torch.zeros_like(total)
    for start in range(0, length, ROWS_AT_ONCE):
        rows = torch.arange(start, min(start + ROWS_AT_ONCE, length), device=seen.query.device).expand(images, -1)
        total += seen.attention(rows).mean(1).sum(1)
        viewers += seen.visible(rows)[:, 0].sum(1)
    return total / viewers.clamp(min=1)


def keys(seen: AttentionCall, heads: str = "joint") -> Tensor:
    """float32 [images, P, C]: keys of all positions.

    Args:
        seen: a layer's queries and keys.
        heads: "joint" or "mean", see `tokenprune.core.reads.TowerKeys`.
    """
    return seen.key.float().mean(1) if heads == "mean" else _joint(seen.key)


def values(seen: AttentionCall) -> Tensor:
    """float32 [images, P, C]: values of all positions, heads concatenated."""
    return _joint(seen.value)


def mean_state(states: Iterable[Tensor]) -> Tensor:
    """float32 [images, P, C]: the mean of states of all positions, [images, P, C] each; see `TowerStates`."""
    total, count = torch.zeros((), dtype=torch.float32), 0
    for state in states:
        total, count = state.float() + total, count + 1
    return total / count


def cls_query(seen: AttentionCall) -> Tensor:
    """float32 [images, 1, C]: the query of [CLS], the first position, heads concatenated."""
    return _joint(seen.query[:, :, :1])


def _joint(states: Tensor) -> Tensor:
    return states.transpose(1, 2).flatten(2).float()
