"""A step on a cache that a prefill has filled: decoded tokens, or a later turn of a conversation."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, StaticLayer

from tokenprune.core.ledger import LaterTurn
from tokenprune.engine.caches.cache_layers import (
    CachedPrefill,
    PrunedDynamicLayer,
    PrunedLayer,
    PrunedStaticLayer,
    drop_behind,
)
from tokenprune.engine.decoder import Decoder
from tokenprune.engine.sequence.layer_inputs import SharedArguments
from tokenprune.engine.sequence.positions import renumber_step, since_prefill, tables_of
from tokenprune.errors import PruningWarning


class CachedStep:
    """One call of the decoder that continues a pruned prefill.

    Args:
        decoder: the decoder.
        cached: the prefill.
        new: tokens per row in this step.
        past: tokens per row decoded before it.
        mask: two-dimensional attention mask of the step, 0 on padding; None = no padding.

    Raises:
        UnsupportedError: a static cache has no room for the new tokens.
    """

    def __init__(self, decoder: Decoder, cached: CachedPrefill, new: int, past: int, mask: Tensor | None) -> None:
        cached.check_room(cached.length + past + new)
        self._decoder, self._cached = decoder, cached
        self._new, self._past, self._mask = new, past, mask
        self._since: Tensor | None = None
        self._cuts = SharedArguments[dict[str, Any]]()
        self._slots: dict[tuple[int, torch.device], Tensor] = {}
        self._placed: list[PrunedStaticLayer] = []
        self._turn: LaterTurn | None = None

    def count_images(self, images: Tensor, why: str | None) -> None:
        """Record the image tokens of a later turn, bool [batch, new], which are not pruned; warn of the reason, unless
        it is the strategy, which prunes none (None)."""
        counts = images.sum(1).tolist()
        real = [self._new] * len(images) if self._mask is None else self._mask[:, -self._new :].sum(1).tolist()
        if why is not None:
            warnings.warn(
                f"a later turn added {max(counts)} image tokens to a filled KV cache; they are kept whole in all "
                f"layers, since {why}; trace.ledger.later_turns counts them",
                PruningWarning,
                stacklevel=2,
            )
        self._turn = LaterTurn(tuple(counts), tuple(n - image for n, image in zip(real, counts, strict=True)))

    def expect(self, cache: Any, number: int) -> PrunedLayer | None:
        """Allow a layer to append to its part of the cache; returns that part if it lacks pruned tokens."""
        own = cache.layers[number] if number < len(cache.layers) else None
        if not isinstance(own, PrunedLayer):
            return None
        if isinstance(own, PrunedStaticLayer):
            self._place(own)
        own.expected = True
        return None if own.frame is None else own

    def _place(self, own: PrunedStaticLayer) -> None:
        where = own.held, own.device
        if where not in self._slots:
            self._slots[where] = torch.arange(own.held, own.held + self._new, device=own.device)
        own.slots = self._slots[where]
        self._placed.append(own)

    def shorten(self, own: PrunedLayer, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """Adapt a layer's arguments to a cache that lacks pruned tokens; `kwargs` is changed in place.

        Args:
            own: the layer's part of the cache, from `expect`.
            number: the layer's number.
            hidden: [batch, new, width], the layer's input.
            kwargs: its keyword arguments, made for the full sequence.
        """
        assert own.frame is not None
        names = ("attention_mask", "position_embeddings", "position_ids")
        mask, ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
        given = own.frame, own.renumbered, mask, ids, *tables_of(kwargs)
        cut = {name: kwargs[name] for name in names if name in kwargs}
        kwargs.update(self._cuts.once(given, partial(self._cut, own, number, hidden, cut)))

    def _cut(self, own: PrunedLayer, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        assert own.frame is not None
        # the model's mask counts pruned tokens as keys, but the cache does not contain them
        flash = "flash" in self._decoder.attention_name
        mask = kwargs.get("attention_mask")
        kwargs["attention_mask"] = own.frame.decode_mask(mask, self._new, self._past, own.room, two_d=flash)
        if own.renumbered is not None:
            if self._since is None:  # the same for all layers
                drafted = self._cached.drafted
                prompt = own.frame.length - drafted
                self._since = since_prefill(self._mask, prompt, self._past + drafted, self._new)
            renumber_step(self._decoder, number, hidden, kwargs, own.renumbered, self._since)
        return kwargs

    def fail(self, cache: Any) -> None:
        """After an error: some layers of the cache may hold the new tokens already.

        Growing layers lose them, and slots of pruned static ones are written anew by the next step. Static layers of
        transformers do not tell their lengths without waiting for the device, a state does not go back, and a sliding
        window has forgotten what it had before: a cache that has one of them cannot be continued.
        """
        if self._cached.keeps_states:
            self._cached.failed = True
            return
        length = self._cached.length + self._past
        for own in getattr(cache, "layers", ()):
            if isinstance(own, PrunedDynamicLayer) or type(own) is DynamicLayer:
                drop_behind(own, length - getattr(own, "absent", 0))
            elif not isinstance(own, PrunedStaticLayer):
                self._cached.failed |= isinstance(own, StaticLayer) or int(own.get_seq_length()) > length

    def finish(self) -> None:
        """After the last layer: count the tokens of static layers, and record a turn with images.

        A call that failed earlier does neither, so that its tokens are overwritten.
        """
        for own in self._placed:
            if own.held:
                own.held += self._new
        if self._turn is not None:
            self._cached.ledger.later_turns.append(self._turn)
