"""Pictures of a batch on the model's device; on CUDA from pinned memory, so that copies overlap with work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor


def batched(pictures: Sequence[Tensor], like: Tensor) -> Tensor:
    """Pictures [1, …] of one size as a batch [B, …], with the device and dtype of another tensor.

    Each is copied by itself, since joining pinned ones first would give memory that is not pinned. A copy from memory
    that is not pinned waits until it is done.
    """
    placed = [picture.to(like.device, non_blocking=picture.is_pinned()) for picture in pictures]
    placed = [picture.to(like.dtype) for picture in placed]
    return placed[0] if len(placed) == 1 else torch.cat(placed)


def pinned(prepared: Any) -> Any:
    """A prepared image (a dataclass) with its tensors in page-locked memory, which `batched` copies without waiting."""
    tensors = {field.name: getattr(prepared, field.name) for field in fields(prepared)}
    changes = {name: value.pin_memory() for name, value in tensors.items() if isinstance(value, Tensor)}
    return replace(prepared, **changes)
