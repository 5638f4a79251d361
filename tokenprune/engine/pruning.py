"""`prune`: opens a pruning context on a model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ContextDecorator, ExitStack, contextmanager
from functools import partial, wraps
from types import NoneType, TracebackType
from typing import Any, Literal, ParamSpec
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from tokenprune.core.strategy import Strategy, checked_strategy
from tokenprune.engine.calls.continuous_batching import no_continuous_batching
from tokenprune.engine.calls.generate import Generations
from tokenprune.engine.calls.interception import intercepting
from tokenprune.engine.calls.torch_compile import (
    hooks_on,
    refuse_skipped_hooks,
    translate_compile_errors,
    uncompiled_forward,
)
from tokenprune.engine.calls.wrappers import outermost_module, unwrapped
from tokenprune.engine.decoder import find_decoder
from tokenprune.engine.interface.bound_model import BoundModel
from tokenprune.engine.interface.checked_model import bound_model_of
from tokenprune.engine.interface.compatibility import check_on
from tokenprune.engine.interface.marked_model import MarkedModel
from tokenprune.engine.interface.turns import decoder_in, open_context
from tokenprune.engine.interface.vision_source import VisionSource
from tokenprune.engine.run import PruningRun
from tokenprune.errors import InputError, PluginError, PluginWarning, PruningWarning, UnsupportedError
from tokenprune.utils.arguments import instance, shown, whole_number

_P = ParamSpec("_P")
_OPEN: WeakKeyDictionary[nn.Module, dict[PruningRun, Callable[[], bool]]] = WeakKeyDictionary()  # by decoder


class _NotEnteredError(UnsupportedError, AttributeError):
    """An attribute of the run was used before the context was entered."""


class Pruning(ContextDecorator, AbstractContextManager[PruningRun]):
    """The result of `prune`: a context manager, entered once, or a decorator that opens a context in each call."""

    def __init__(self, make: Callable[[], AbstractContextManager[PruningRun]]) -> None:
        self._make, self._context, self._used = make, make(), False

    def __enter__(self) -> PruningRun:
        if self._used:
            raise UnsupportedError(
                "this tokenprune.prune(...) was already entered; a context opens once, so call prune() again"
            )
        self._used = True
        return self._context.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return self._context.__exit__(kind, error, traceback)

    def __call__(self, function: Any) -> Any:
        """Decorate a function: each call runs in a new context."""
        self._used = True
        return super().__call__(function)

    def _recreate_cm(self) -> Pruning:
        return Pruning(self._make)

    def __getattr__(self, name: str) -> Any:
        raise _NotEnteredError(
            f"tokenprune.prune(...) has no {name!r}: it is a context manager; write "
            "`with tokenprune.prune(...) as run:` and use run"
        )

    def __del__(self) -> None:
        if not self.__dict__.get("_used", True):
            warnings.warn(
                "tokenprune.prune(...) was never entered, so nothing was pruned; write `with tokenprune.prune(...):`",
                PruningWarning,
                stacklevel=2,
            )


def _entered(function: Callable[_P, Iterator[PruningRun]]) -> Callable[_P, Pruning]:
    context = contextmanager(function)

    @wraps(function)
    def made(*args: _P.args, **kwargs: _P.kwargs) -> Pruning:
        return Pruning(partial(context, *args, **kwargs))

    return made


def open_run(model: nn.Module) -> PruningRun | None:
    """The run of the open context that prunes this thread's calls of a model; None if they are not pruned.

    For models whose own methods call the decoder: their caller may have opened a context around the method.

    Args:
        model: the decoder, or any model that `prune` takes.
    """
    runs = _OPEN.get(decoder_in(model), {})
    return next((run for run, applies in runs.items() if applies()), None)


@_entered
def prune(
    model: nn.Module | BoundModel,
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
    strict: bool = False,
) -> Iterator[PruningRun]:
    """Prune image tokens in every prefill of `model` while the context is open.

    Args:
        model: a vision-language model that an installed adapter supports; a segmentation model from `tokenprune.load`,
            whose `segment` is then pruned; or, with `image_tokens`, a transformers decoder or any model that contains
            exactly one. Wrappers are unwrapped (`peft.PeftModel`, `DataParallel`, `DistributedDataParallel`, pipelines
            of transformers).
        strategy: how to prune; see `tokenprune.strategy`.
        image_tokens: bool [batch, sequence], the image tokens in the decoder's input. They apply to prompts of this
            shape: rows may be repeated for returned sequences and beams, and be followed by generated tokens. A second
            stream of `generate` (`guidance_scale`) counts as text only; other prompts are refused.
        query: the query row for attention scores if none is marked: "last" (the default) or bool [batch, sequence].
        queries: named query rows, bool [batch, sequence] each ("mask_query", "seg", …).
        grid: int64 [batch, sequence, 2], grid cells of the image tokens; by default square images in row-major order.
        image_number: int64 [batch, sequence]; by default consecutive image tokens form one image.
        vision: the reads of the vision side.
        seed: added to the seeds of strategies that draw random numbers.
        wait: if another thread has a context open on the model, or is running `segment` or `answer`: False raises
            BusyError, True waits (for ever, if that thread waits for this one), a number is a timeout in seconds.
        threads: whose calls of the model are pruned. "any": those of all threads, one at a time, for example if
            `generate` streams from a worker thread. "own": those of this thread. Other calls run unpruned, as
            `segment` and `answer` in other threads always do.
        strict: check plugins more closely, for their authors: tensors of `Tokens` that a strategy modifies in place or
            keeps after the prefill, global settings of PyTorch that it changes, and observers that modify the run. The
            conformance kits always do so.

    Yields:
        The run; `run.trace` describes the latest prefill.

    Raises:
        InputError: masks of the wrong shape or type, or none for a plain decoder; `grid`, `image_number` or `vision`
            without `image_tokens`.
        OptionError: `model`, `strategy`, `seed` or another argument is of the wrong type.
        IncompatibleError: the strategy requires a read that the model does not provide.
        BusyError: another thread still uses the model after `wait`, or ended with its context open.
        UnsupportedError: no adapter supports the model, it contains no decoder, or this thread already has a context
            open on it.
        EngineError: the model was changed so that pruning would be bypassed, or the context is closed during a forward.
        PluginError: an adapter, the strategy or an observer fails; the error names it.

    Examples:
        >>> import torch, tokenprune as tp
        >>> from tokenprune.testing.tiny_decoders import tiny_llama
        >>> model, ids = tiny_llama(layers=4), torch.arange(1, 25)[None]
        >>> image_tokens = torch.zeros(1, 24, dtype=torch.bool)
        >>> image_tokens[:, 4:20] = True
        >>> with tp.prune(model, tp.strategy("fastv", layer=1, keep=4), image_tokens=image_tokens) as run:
        ...     logits = model(input_ids=ids).logits
        >>> run.trace
        Trace(FastV(layer=1, keep=4): 16 image tokens, 4 from layer 1; 7.0 equivalent tokens (43.8%))
    """
    checked_strategy(strategy)
    seed = whole_number("seed", seed)
    instance("strict", strict, bool, "True or False")
    named = _query_rows(query, queries)
    _check_marks(image_tokens, grid=grid, image_number=image_number, vision=vision)
    given = unwrapped(model)
    model = given.decoder if isinstance(given, BoundModel) else given
    bound = (
        bound_model_of(given) if image_tokens is None else MarkedModel(model, image_tokens, grid, image_number, vision)
    )
    decoder = find_decoder(bound.decoder)
    reads = check_on(strategy, bound, decoder)
    with ExitStack() as stack:
        stack.enter_context(translate_compile_errors())
        applies = stack.enter_context(open_context(decoder.module, wait, threads))
        whole = outermost_module(model, decoder.module)
        hooks = hooks_on(whole)
        stack.enter_context(uncompiled_forward(whole))
        with intercepting(applies):
            capture = stack.enter_context(bound.capture(reads))
        stack.enter_context(refuse_skipped_hooks(whole, hooks, bound.source or bound.name))
        answers = dict.fromkeys(bound.offers(), capture.provide)
        source = VisionSource(answers, bound.tower_layers, bound.source)
        generations = Generations(whole, decoder.module)
        run = PruningRun(
            decoder,
            strategy,
            capture,
            queries=named,
            generations=generations,
            vision=source,
            seed=seed,
            strict=strict,
        )
        with intercepting(applies):
            stack.enter_context(no_continuous_batching(whole))
            stack.enter_context(generations.intercepted(lambda: not run.never_prunes()))
            stack.enter_context(run.attached())
            stack.enter_context(generations.open())
        _OPEN.setdefault(decoder.module, {})[run] = applies
        stack.callback(_OPEN[decoder.module].pop, run)
        try:
            run.tell("tokenprune_run_started")
            yield run
        except BaseException:
            try:
                run.tell("tokenprune_run_finished")
            except PluginError as wrong:  # raise the error of the caller's code, not this one
                warnings.warn(str(wrong), PluginWarning, stacklevel=4)
            raise
        run.tell("tokenprune_run_finished")


def _query_rows(query: str | Tensor | None, queries: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The caller's query rows by name. Raises InputError if a row is not a mask, or a name not a string."""
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


def _check_marks(image_tokens: Tensor | None, **dependent: object) -> None:
    """Raise InputError for arguments of the wrong type, or for those that have no effect without `image_tokens`."""
    kinds = {"grid": Tensor, "image_number": Tensor, "vision": VisionSource}
    expected = {"vision": "a tokenprune.engine.VisionSource"}
    instance("image_tokens", image_tokens, (NoneType, Tensor), "a bool [batch, sequence] mask", InputError)
    for name, value in dependent.items():
        if value is None:
            continue
        if image_tokens is None:
            raise InputError(
                f"{name}= was passed without image_tokens=, and has no effect without it; pass both, or neither if the "
                "model's adapter finds the image tokens"
            )
        instance(name, value, kinds[name], expected.get(name, "an int64 tensor [batch, sequence, …]"), InputError)
