"""Copies in the host's memory of tensors on a device, for which the host has to wait."""

from __future__ import annotations

import torch
from torch import Tensor


def on_host(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the host's memory: those that are on a device are copied together, which waits for it only once.

    Tensors without values (on the meta device) are returned as they are.
    """
    found = list(tensors)
    for device in {one.device for one in tensors if one.device.type not in ("cpu", "meta")}:
        away = [number for number, one in enumerate(tensors) if one.device == device]
        parts = [tensors[number].detach().contiguous().flatten().view(torch.uint8) for number in away]
        copied = torch.cat(parts).cpu().split_with_sizes([len(part) for part in parts])
        for number, part in zip(away, copied, strict=True):
            own = tensors[number]
            found[number] = part.clone().view(own.dtype).reshape(own.shape)  # cloned, since a view must be aligned
    return found
