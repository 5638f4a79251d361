"""Removing chosen token numbers from a list."""

from __future__ import annotations

import torch
from torch import Tensor


def without(numbers: Tensor, chosen: Tensor, size: int) -> Tensor:
    """int64 [n − m]: `numbers` without those in `chosen`, in the same order.

    Its length is known, so that a device is not waited for.

    Args:
        numbers: int64 [n], different ones of 0 … size − 1.
        chosen: int64 [m], some of them, different ones.
        size: number of all tokens.
    """
    gone = torch.zeros(size, dtype=torch.bool, device=numbers.device).index_fill_(0, chosen, True)
    order = gone[numbers].int().argsort(stable=True)
    return numbers[order[: len(numbers) - len(chosen)]]
