"""Continuous batching of transformers (`generate_batch`), in which a pruning context has no say."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NoReturn

from torch import nn

from tokenprune.engine.calls.interception import shadowed
from tokenprune.errors import UnsupportedError


def no_continuous_batching(model: nn.Module) -> AbstractContextManager[Any]:
    """Refuse it where it is called: what a thread of its own raises later is logged only, and no tokens come back."""
    return shadowed(model, "init_continuous_batching", _refuse)


def _refuse(original: Callable[..., Any], *args: Any, **kwargs: Any) -> NoReturn:
    raise UnsupportedError(
        "continuous batching (generate_batch) found under tokenprune.prune(): it packs prompts of all lengths into one "
        "row and keeps them in a paged cache, which cannot be pruned; call generate() on a batch, or generate_batch() "
        "outside of the context"
    )
