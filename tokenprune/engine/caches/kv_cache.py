"""KV caches that contain fewer tokens than the sequence: checks, and layers replaced by those that lack tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from tokenprune.engine.caches.cache_layers import (
    CachedPrefill,
    Lease,
    PrunedDynamicLayer,
    PrunedLayer,
    PrunedStaticLayer,
)
from tokenprune.engine.caches.earlier import EarlierCaches
from tokenprune.engine.sequence.gathered import GatheredSequence
from tokenprune.errors import InputError, UnsupportedError

_OLD: Any = getattr(cache_utils, "SlidingWindowLayer", None)  # its name in older releases
_StaticSliding: Any = getattr(cache_utils, "StaticSlidingWindowLayer", _OLD)
_States: Any = getattr(cache_utils, "LinearAttentionLayer", None)
_REPLACEABLE = {DynamicLayer, DynamicSlidingWindowLayer, PrunedDynamicLayer}
_REPLACEABLE |= {StaticLayer, _StaticSliding, PrunedStaticLayer}


def held_tokens(cache: Any) -> int:
    """Tokens per row in a cache, including pruned ones; 0 without a cache.

    Raises:
        UnsupportedError: the layers have different lengths, since some were modified or a call failed.
    """
    if cache is None:
        return 0
    held = int(cache.get_seq_length())
    lengths = set()
    for own in getattr(cache, "layers", ()):
        length = own.get_seq_length() if hasattr(own, "get_seq_length") else 0  # a state has no length
        if not isinstance(length, Tensor):  # transformers' static layers count on the device, which to ask takes time
            lengths.add(int(length))
    lengths.discard(0)  # a layer that shares keys and values of another is empty
    if len(lengths) > 1:
        raise UnsupportedError(
            f"the layers of the KV cache have {', '.join(map(str, sorted(lengths)))} tokens, expected the same number "
            "in all; some were modified, or a call failed: start with an empty cache"
        )
    return held


def is_pruned(cache: Any) -> bool:
    """True if layers of a cache lack tokens that were pruned."""
    return any(isinstance(own, PrunedLayer) for own in getattr(cache, "layers", ()))


def check_cache(cache: Any, attends: Sequence[bool]) -> None:
    """Refuse a cache that the engine cannot prune.

    Args:
        cache: an empty cache.
        attends: for each layer of the decoder, whether it attends to the sequence; the others keep a state.

    Raises:
        UnsupportedError: the cache is neither a `DynamicCache` nor a `StaticCache` of a supported kind, or has no
            states for layers that keep one.
    """
    layers = getattr(cache, "layers", ())
    if isinstance(cache, Cache) and not all(attends) and [type(own) is not _States for own in layers] != [*attends]:
        names = ", ".join(sorted({type(own).__name__ for own in layers})) or "made one by one"
        raise UnsupportedError(
            f"KV cache with layers {names} does not fit a decoder some of whose layers keep a state; create it with "
            "the decoder's config: DynamicCache(config=model.config)"
        )
    kinds = {type(own) for own in layers} - {_States}
    offloaded = bool(getattr(cache, "offloading", False)) and any(issubclass(kind, StaticLayer) for kind in kinds)
    if not isinstance(cache, Cache) or not kinds <= _REPLACEABLE or offloaded or kinds == {_StaticSliding}:
        names = ", ".join(sorted(kind.__name__ for kind in kinds)) or type(cache).__name__
        raise UnsupportedError(
            f"KV cache of type {'offloaded ' if offloaded else ''}{names} is not supported under tokenprune.prune(), "
            "expected a DynamicCache, or a StaticCache that is not offloaded and not all of sliding windows"
        )


def max_cache_len(cache: Any) -> int | None:
    """The length of a static cache; None = the cache grows."""
    # of a layer with a sliding window it is not more than the window
    lengths = [int(own.max_cache_len) for own in getattr(cache, "layers", ()) if isinstance(own, StaticLayer)]
    return max(lengths, default=None)


def clear(cache: Cache) -> None:
    """Remove all traces of an earlier prefill from an empty cache."""
    CachedPrefill.erase(cache)
    for number, own in enumerate(cache.layers):
        if isinstance(own, PrunedStaticLayer):
            cache.layers[number] = StaticLayer(max_cache_len=own.max_cache_len)
        elif isinstance(own, PrunedLayer):
            cache.layers[number] = DynamicLayer()
        elif _States is not None and isinstance(own, _States):
            own.reset()


def check_same_context(known: CachedPrefill | None, lease: Lease) -> CachedPrefill:
    """Refuse a filled cache that does not belong to the open context.

    Raises:
        UnsupportedError: it was filled elsewhere.
    """
    if known is None:
        raise UnsupportedError(
            "the KV cache already contains tokens from outside this pruning context, which were not pruned; start with "
            "an empty cache inside the context"
        )
    if known.lease is not lease:
        if known.lease.pickled:
            raise known.refusal()
        state = "another one" if known.lease.open else "one that is closed"
        raise UnsupportedError(
            f"the KV cache was not filled in this pruning context but in {state}; continue inside the context that "
            "filled it, or start with an empty cache"
        )
    if known.failed:
        kind = "KV cache" if known.max_cache_len is None else "StaticCache"
        raise UnsupportedError(
            f"a call that continued this {kind} failed, so that some of its layers may hold other tokens than the "
            "rest; start with an empty cache"
        )
    return known


def check_rows(cache: Any, rows: int) -> None:
    """Raise InputError, before anything is changed, if a filled cache has another number of rows than a call."""
    keys = (getattr(own, "keys", None) for own in getattr(cache, "layers", ()))
    held = next((len(own) for own in keys if isinstance(own, Tensor) and own.dim() == 4), rows)
    if held != rows:
        raise InputError(
            f"the KV cache has {held} rows, but the call that continues it has {rows}; pass as many rows, or repeat or "
            "select those of the cache (batch_repeat_interleave, batch_select_indices)"
        )


def shorten_layer(
    cache: Cache, number: int, frame: GatheredSequence, renumbered: Tensor | None, prefill: CachedPrefill
) -> None:
    """Replace the still empty layer `number` of a cache by one for a shortened sequence."""
    layers: list[Any] = cache.layers
    # a cache without a config creates its layers one by one
    layer = _pruned_layer(frame, renumbered, prefill)
    layer.expected = True
    layers[number : number + 1] = [layer]


def _pruned_layer(
    frame: GatheredSequence | None, renumbered: Tensor | None, prefill: CachedPrefill
) -> PrunedDynamicLayer | PrunedStaticLayer:
    if prefill.max_cache_len is None:
        return PrunedDynamicLayer(frame, renumbered, prefill)
    return PrunedStaticLayer(frame, renumbered, prefill, max_cache_len=prefill.max_cache_len)


def end_update(cache: Any) -> None:
    """Expect no further updates of a cache after a call, which may have failed before it updated all layers."""
    for own in getattr(cache, "layers", ()):
        if isinstance(own, PrunedLayer):
            own.expected = False


def unify_layers(cache: Cache, valid: Tensor, prefill: CachedPrefill, earlier: EarlierCaches) -> None:
    """Convert the other layers of a filled cache, some of whose layers lack tokens, to `PrunedLayer`.

    Sliding-window layers then receive masks of the true length, as pruned layers do. Static layers get their slots.

    Args:
        cache: the cache, filled by a prefill.
        valid: bool [batch, S], False on padding.
        prefill: the prefill that filled it.
        earlier: what caches lose after it.
    """
    layers: list[Any] = cache.layers
    for number, own in enumerate(layers):
        if getattr(own, "keys", None) is None:  # empty, or a state, which the layer left as it should be
            continue
        frame, renumbered = (own.frame, own.renumbered) if isinstance(own, PrunedLayer) else (None, None)
        if getattr(own, "is_sliding", False) and frame is None:
            # it contains only the last positions, the same in all rows, as if the earlier ones had been pruned
            last = min(own.keys.shape[-2], prefill.length)
            present = torch.zeros(valid.shape, dtype=torch.bool)
            present[:, prefill.length - last :] = True
            frame = GatheredSequence.of(present).to(valid.device)
        layer, keys, values = own, own.keys, own.values
        if number in earlier.layers:
            shorter = GatheredSequence.of(earlier.kept(number, frame)).to(valid.device)
            places = shorter.index if frame is None else frame.places(shorter.index).clamp(min=0)  # of fillers
            frame, (keys, values) = shorter, (_at(states, places) for states in (keys, values))
        if frame is not getattr(own, "frame", None) or not isinstance(own, PrunedLayer):
            layers[number] = layer = _pruned_layer(frame, renumbered, prefill)
        if isinstance(layer, PrunedStaticLayer):
            layer.hold(keys, values)
        elif layer is not own:
            # lazy_initialization() has another signature in older releases of transformers
            layer.dtype, layer.device, layer.is_initialized = own.keys.dtype, own.keys.device, True
            layer.keys, layer.values = keys, values


def _at(states: Tensor, places: Tensor) -> Tensor:
    """Keys or values [batch, heads, K, size] at places int64 [batch, n]: [batch, heads, n, size]."""
    index = places.to(states.device)[:, None, :, None]
    return states.gather(2, index.expand(-1, states.shape[1], -1, states.shape[3]))
