"""A prefill without pruning whose rows begin with the same tokens, which are computed once."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from tokenprune.engine.caches.kv_cache import held_tokens
from tokenprune.engine.calls.interception import is_compiled_run, shadowed
from tokenprune.engine.decoder import Decoder, find_decoder
from tokenprune.engine.sequence.shared_prefix import SharedPrefix


@contextmanager
def shared_prefill(model: nn.Module, length: int, valid: Tensor) -> Iterator[None]:
    """While open, the decoder's first forward in this thread computes the common columns of its rows once.

    Under `tokenprune.prune` the engine does that itself, see `PromptMasks.shared`. Later forwards, which continue the
    cache, are left alone.

    Args:
        model: contains the decoder.
        length: columns that are the same in all rows, counted from the first token of a row.
        valid: bool [batch, S], False on padding, of that forward.

    Raises:
        UnsupportedError: no decoder, see `tokenprune.prune`.
    """
    decoder = find_decoder(model)
    if _is_compiled(decoder):  # interception would break its graphs
        yield
        return
    prefix = SharedPrefix(decoder, length, valid)
    with ExitStack() as undo:
        for number, layer in enumerate(decoder.layers):
            undo.enter_context(shadowed(layer, "forward", partial(_layer, decoder, prefix, number)))
        yield


def _is_compiled(decoder: Decoder) -> bool:
    inside = any(part._compiled_call_impl is not None for part in decoder.module.modules())
    return inside or is_compiled_run() or any(map(operator.is_not, decoder.called, decoder.layers))


def _layer(
    decoder: Decoder, prefix: SharedPrefix, number: int, original: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    hidden = args[0] if args else kwargs.pop("hidden_states")
    if number == 0:
        if held_tokens(kwargs.get("past_key_values")):
            prefix.stop()
        prefix.begin(hidden, None)
    if len(args) > 1:
        prefix.stop()
        return original(*args, **kwargs)
    output = prefix.run(original, number, hidden, kwargs)
    if number < len(decoder.layers) - 1 and decoder.is_observed(number):
        prefix.stop()
    return output
