"""The engine: runs a strategy on a transformers decoder through hooks, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from tokenprune.base import Strategy
from tokenprune.engine.context import PruningRun, prune_decoder
from tokenprune.engine.vision import VisionSource
from tokenprune.errors import InputError
from tokenprune.registry import observers

__all__ = ["PruningRun", "VisionSource", "prune"]


@contextmanager
def prune(
    model: nn.Module,
    strategy: Strategy,
    *,
    image_tokens: Tensor | None = None,
    query: str | Tensor | None = None,
    queries: Mapping[str, Tensor] | None = None,
    grid: Tensor | None = None,
    image_number: Tensor | None = None,
    vision: VisionSource | None = None,
    seed: int = 0,
) -> Iterator[PruningRun]:
    """Prune image tokens in every prefill of `model` while the context is open.

    Args:
        model: a transformers decoder, or a model that has exactly one inside.
        strategy: what to prune; see `tokenprune.strategy`.
        image_tokens: bool [batch, sequence], where the image tokens stand in the decoder's input.
        query: the query row for attention scores where none is marked: "last" (the default) or bool [batch, sequence].
        queries: named query rows, bool [batch, sequence] each ("mask_query", "seg", …).
        grid: int64 [batch, sequence, 2], grid cells of the image tokens; by default square images row by row.
        image_number: int64 [batch, sequence]; by default every run of image tokens is one image.
        vision: what strategies may read from the vision side.
        seed: added to the seeds of strategies that draw random numbers.

    Yields:
        The run; `run.trace` tells what the latest prefill did.

    Raises:
        InputError: no image tokens given, or masks that do not fit.
        UnsupportedError: no decoder to hook into, or a context is open on it already.
    """
    if image_tokens is None:
        raise InputError(
            f"{type(model).__name__}: where are the image tokens? Give image_tokens=, a bool [batch, sequence] "
            "mask over the decoder's input"
        )
    named = dict(queries or {})
    if isinstance(query, Tensor):
        named.setdefault("mask_query", query)
    elif query not in (None, "last"):
        raise InputError(f"query={query!r} found, expected 'last' or a bool [batch, sequence] mask")
    with prune_decoder(
        model,
        strategy,
        image_tokens,
        queries=named,
        grid=grid,
        image_number=image_number,
        vision=vision,
        observer=observers,
        seed=seed,
    ) as run:
        observers.tokenprune_run_started(run=run)
        try:
            yield run
        finally:
            observers.tokenprune_run_finished(run=run)
