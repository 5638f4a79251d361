"""Calls on a filled cache: decoded tokens, or a later turn of a conversation, whose images are pruned if possible."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from tokenprune.engine.caches.cache_layers import CachedPrefill, Lease
from tokenprune.engine.caches.decoding import CachedStep
from tokenprune.engine.caches.filled_cache import FilledCache
from tokenprune.engine.caches.kv_cache import check_rows, check_same_context, is_pruned
from tokenprune.engine.call import Call
from tokenprune.engine.calls import checkpointing
from tokenprune.engine.decoder import Decoder
from tokenprune.engine.interface.bound_model import VisionCapture, padding_mask
from tokenprune.engine.sequence.deepstack import DeepStack


class LaterTurns:
    """How calls on filled caches run in a context.

    Args:
        decoder: the decoder.
        capture: of the model.
        lease: of the context.
        queries: named query rows from the caller, which are of the first prompt.
    """

    def __init__(
        self, decoder: Decoder, capture: VisionCapture, lease: Lease, queries: Mapping[str, Tensor] | None
    ) -> None:
        self._decoder, self._capture, self._lease, self._marked = decoder, capture, lease, bool(queries)

    def prepare(
        self,
        call: Call,
        never_prunes: Callable[[], bool],
        kwargs: dict[str, Any] | None = None,
        hidden: Tensor | None = None,
    ) -> None:
        """Make a filled cache ready for a turn with images that are pruned, unless it is already.

        Called before the decoder runs and, since some decoders encode the images themselves, before its first layer.

        Args:
            call: the call.
            never_prunes: whether the strategy prunes nothing.
            kwargs: the decoder's keyword arguments, before it runs; features that it would add between its layers are
                taken out.
            hidden: [batch, new, width], the input of its first layer.

        Raises:
            InputError: the cache has another number of rows.
            UnsupportedError: the cache was filled elsewhere, or is too short.
        """
        cache = call.inputs.get("past_key_values") if call.cache is None else call.cache
        new = _new_tokens(call.inputs) if hidden is None else (len(hidden), hidden.shape[1])
        known = CachedPrefill.of(cache) if call.held and new is not None and new[1] > 1 else None
        if new is None or known is None or call.filled is not None or self._decoder.checkpoints:
            return
        images = self._images(call)
        if images is None or never_prunes() or self._kept_whole() is not None:
            return
        check_same_context(known, self._lease).check_room(call.held + new[1])
        check_rows(cache, new[0])
        call.filled = FilledCache(cache, known, call.held, self._padding(call), new[0], images.device)
        if kwargs is not None:
            call.deepstack = DeepStack.take(kwargs, len(self._decoder.layers))

    def step(self, call: Call, hidden: Tensor, never_prunes: Callable[[], bool]) -> None:
        """Make a call a step on a filled cache, which prunes none of its tokens.

        Args:
            call: the call.
            hidden: [batch, new, width], the input of the first layer.
            never_prunes: whether the strategy prunes nothing.

        Raises:
            InputError: the cache has another number of rows.
            UnsupportedError: the cache was filled elsewhere, the decoder checkpoints its layers, or flash attention
                would count a window without pruned tokens.
        """
        known = CachedPrefill.of(call.cache)
        if known is None and never_prunes():
            return  # nothing was pruned before, and nothing would be
        if self._decoder.checkpoints:
            raise checkpointing.refuse_cached("a filled KV cache")
        known, new = check_same_context(known, self._lease), hidden.shape[1]
        check_rows(call.cache, len(hidden))
        if is_pruned(call.cache):
            self._decoder.check_window(call.held + new)
        call.step = CachedStep(self._decoder, known, new, call.held - known.length, self._padding(call))
        images = self._images(call) if new > 1 else None
        if images is not None:
            call.step.count_images(images, None if never_prunes() else self._kept_whole())

    def _images(self, call: Call) -> Tensor | None:
        """bool [batch, new], image tokens among the new ones; None = none."""
        before, call.in_plugin_code = call.in_plugin_code, True
        try:
            images = self._capture.later()
        finally:
            call.in_plugin_code = before
        return images if images is not None and bool(images.any()) else None

    def _kept_whole(self) -> str | None:
        """Why images of later turns are kept whole; None = they are pruned."""
        if self._decoder.keeps_states:
            return "some layers of this decoder keep a state"
        if self._decoder.tempered:
            return "some layers of this decoder scale queries by their place"
        return "query rows were marked, which are of the first prompt" if self._marked else None

    def _padding(self, call: Call) -> Tensor | None:
        outer = self._capture.padding()
        return padding_mask(call.inputs) if outer is None else outer


def _new_tokens(inputs: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and tokens per row of a call; None if its arguments do not tell."""
    given = (inputs.get(name) for name in ("inputs_embeds", "input_ids"))
    return next(((len(one), one.shape[1]) for one in given if isinstance(one, Tensor) and one.dim() > 1), None)
