"""`prune`: the context in which a model runs pruned."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Literal

from torch import Tensor, nn

from tokenprune.core.strategy import Strategy
from tokenprune.engine.calls.generate import Generations, generation
from tokenprune.engine.calls.interception import concerning
from tokenprune.engine.calls.torch_compile import hooks_on, hooks_seen, not_compiled, told_by_name
from tokenprune.engine.calls.turns import open_context
from tokenprune.engine.calls.wrappers import unwrapped, whole_module
from tokenprune.engine.decoder import find_decoder
from tokenprune.engine.interface.bound_model import binding_of
from tokenprune.engine.interface.compatibility import check_on
from tokenprune.engine.interface.given import Given
from tokenprune.engine.interface.vision_source import VisionSource
from tokenprune.engine.session import PruningRun
from tokenprune.errors import InputError, OptionError, PluginError, PluginWarning
from tokenprune.plugins import observers


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
        image_tokens: bool [batch, sequence], where the image tokens stand in the decoder's input. They are for
            prompts of this shape: each row may be repeated for returned sequences and beams, and have generated tokens
            behind it. A second stream of `generate` (`guidance_scale`) is text alone; other prompts are refused.
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
        InputError: masks that do not fit, or none given for a plain decoder.
        OptionError: no strategy; `wait` or `threads` of another kind.
        IncompatibleError: the strategy reads something that the model does not offer.
        BusyError: another thread uses the model, and `wait` is over.
        UnsupportedError: no adapter knows the model, it has no decoder to hook into, or a context of this thread is
            open on it.
        PluginError: an adapter, the strategy or an observer misbehaves; names it.
    """
    if not isinstance(strategy, Strategy):
        raise OptionError(f"strategy={strategy!r} found, expected an instance, such as tokenprune.strategy('fastv')")
    named = dict(queries or {})
    if isinstance(query, Tensor):
        named.setdefault("mask_query", query)
    elif query not in (None, "last"):
        raise InputError(f"query={query!r} found, expected 'last' or a bool [batch, sequence] mask")
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
        later, missed, padding = (getattr(watch, name, None) for name in ("later", "missed", "padding"))
        generations = Generations(whole, decoder.module)
        run = PruningRun(
            decoder,
            strategy,
            partial(watch.marks, named),
            later=later,
            missed=lambda: generations.missed() or (missed is not None and missed()),
            padding=padding,
            generation=partial(generation, whole),
            vision=source,
            observer=observers,
            seed=seed,
        )
        with concerning(concerns):
            stack.enter_context(generations.followed(lambda: not run.never_prunes()))
            stack.enter_context(run.attached())
            stack.enter_context(generations.open())
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
