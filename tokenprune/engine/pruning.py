"""`prune`: the context in which a model runs pruned."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from types import NoneType
from typing import Literal

from torch import Tensor, nn

from tokenprune.core.strategy import Strategy, checked_strategy
from tokenprune.engine.calls.generate import whole_prompts
from tokenprune.engine.calls.interception import concerning
from tokenprune.engine.calls.torch_compile import hooks_on, hooks_seen, not_compiled, told_by_name
from tokenprune.engine.calls.turns import open_context
from tokenprune.engine.calls.wrappers import unwrapped, whole_module
from tokenprune.engine.decoder import find_decoder
from tokenprune.engine.interface.bound_model import Given, binding_of
from tokenprune.engine.interface.compatibility import check_on
from tokenprune.engine.interface.vision_source import VisionSource
from tokenprune.engine.session import PruningRun
from tokenprune.errors import InputError, PluginError, PluginWarning
from tokenprune.plugins import observers
from tokenprune.utils.arguments import instance, shown, whole_number


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
    wait: bool | float = False,
    threads: Literal["any", "own"] = "any",
) -> Iterator[PruningRun]:
    """Prune image tokens in every prefill of `model` while the context is open.

    Args:
        model: a vision-language model that an installed adapter knows, which finds its image tokens itself; or, with
            `image_tokens`, a transformers decoder or any model that has exactly one inside. Wrappers around it are
            looked through (`peft.PeftModel`, `DataParallel`, `DistributedDataParallel`, pipelines of transformers).
        strategy: what to prune; see `tokenprune.strategy`.
        image_tokens: bool [batch, sequence], where the image tokens stand in the decoder's input.
        query: the query row for attention scores where none is marked: "last" (the default) or bool [batch, sequence].
        queries: named query rows, bool [batch, sequence] each ("mask_query", "seg", …).
        grid: int64 [batch, sequence, 2], grid cells of the image tokens; by default square images row by row.
        image_number: int64 [batch, sequence]; by default every run of image tokens is one image.
        vision: what strategies may read from the vision side.
        seed: added to the seeds of strategies that draw random numbers.
        wait: where another thread has a context open on the model, or is in the middle of `segment` or `answer`: False
            refuses, True waits until it is done (for ever, if it waits for this thread itself), a number waits so many
            seconds.
        threads: whose calls of the model are pruned. "any": those of all threads, one at a time, as where `generate`
            streams from a worker thread. "own": those of this thread. What is not pruned runs as if there were no
            context; so do `segment` and `answer` in other threads always.

    Yields:
        The run; `run.trace` tells what the latest prefill did.

    Raises:
        InputError: masks that do not fit, or none given for a plain decoder; `grid`, `image_number` or `vision` without
            the `image_tokens` that they belong to.
        OptionError: no model, no strategy; a seed that is no whole number, or another argument of another kind.
        IncompatibleError: the strategy reads something that the model does not offer.
        BusyError: another thread uses the model, and `wait` is over.
        UnsupportedError: no adapter knows the model, it has no decoder to hook into, or a context of this thread is
            open on it.
        PluginError: an adapter, the strategy or an observer misbehaves; names it.
    """
    checked_strategy(strategy)
    seed = whole_number("seed", seed)
    named = _query_rows(query, queries)
    _check_marks(image_tokens, grid=grid, image_number=image_number, vision=vision)
    model = unwrapped(model)
    binding = binding_of(model) if image_tokens is None else Given(model, image_tokens, grid, image_number, vision)
    decoder = find_decoder(binding.decoder)
    reads = check_on(strategy, binding, decoder)
    with ExitStack() as stack:
        stack.enter_context(told_by_name())
        concerns = stack.enter_context(open_context(decoder.module, wait, threads))
        whole = whole_module(model, decoder.module)
        hooks = hooks_on(whole)
        stack.enter_context(not_compiled(whole))
        with concerning(concerns):
            watch = stack.enter_context(binding.watch(reads))
        stack.enter_context(hooks_seen(whole, hooks, binding.source or binding.name))
        answers = dict.fromkeys(binding.offers(), watch.provide)
        source = VisionSource(answers, binding.tower_layers, binding.source)
        later, missed = (getattr(watch, name, None) for name in ("later", "missed"))
        run = PruningRun(
            decoder,
            strategy,
            partial(watch.marks, named),
            later=later,
            missed=missed,
            vision=source,
            observer=observers,
            seed=seed,
        )
        with concerning(concerns):
            stack.enter_context(whole_prompts(whole, lambda: not run.never_prunes()))
            stack.enter_context(run.attached())
        try:
            observers.tokenprune_run_started(run=run)
            yield run
        except BaseException:
            try:
                observers.tokenprune_run_finished(run=run)
            except PluginError as wrong:  # the error on its way is the one to tell
                warnings.warn(str(wrong), PluginWarning, stacklevel=3)
            raise
        observers.tokenprune_run_finished(run=run)


def _query_rows(query: str | Tensor | None, queries: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The query rows that the caller names, by name. Raises InputError for what are none."""
    rows = "masks by name, bool [batch, sequence] each"
    named: dict[str, Tensor] = dict(instance("queries", {} if queries is None else queries, Mapping, rows, InputError))
    for name, mask in named.items():
        instance("name of a query row", name, str, "a text, such as 'mask_query'", InputError)
        instance(f"queries[{name!r}]", mask, Tensor, "a bool [batch, sequence] mask", InputError)
    if isinstance(query, Tensor):
        named.setdefault("mask_query", query)
    elif query is not None and not (isinstance(query, str) and query == "last"):
        raise InputError(f"query={shown(query)} found, expected 'last' or a bool [batch, sequence] mask")
    return named


def _check_marks(image_tokens: Tensor | None, **beside: object) -> None:
    """Raise InputError for marks of another kind, or for what would be ignored where the model marks its own."""
    kinds = {"grid": Tensor, "image_number": Tensor, "vision": VisionSource}
    expected = {"vision": "a tokenprune.engine.VisionSource"}
    instance("image_tokens", image_tokens, (NoneType, Tensor), "a bool [batch, sequence] mask", InputError)
    for name, value in beside.items():
        if value is None:
            continue
        if image_tokens is None:
            raise InputError(
                f"{name}= is given without image_tokens=, beside which alone it has an effect; give both, or leave it "
                "out where the model's adapter finds the image tokens"
            )
        instance(name, value, kinds[name], expected.get(name, "an int64 tensor [batch, sequence, …]"), InputError)
