"""Refuses transformers' continuous batching (`generate_batch`), which cannot be pruned."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NoReturn

from torch import nn

from tokenprune.engine.calls.interception import shadowed
from tokenprune.errors import UnsupportedError


def no_continuous_batching(model: nn.Module) -> AbstractContextManager[Any]:
    """Refuse it when it is called: errors of its worker thread are only logged, and it then returns no tokens."""
    return shadowed(model, "init_continuous_batching", _refuse)


def _refuse(original: Callable[..., Any], *args: Any, **kwargs: Any) -> NoReturn:
    raise UnsupportedError(
        "continuous batching (generate_batch) is not supported under tokenprune.prune(): it packs prompts of all "
        "lengths into one row and uses a paged cache; call generate() on a batch, or generate_batch() outside the "
        "context"
    )
