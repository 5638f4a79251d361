"""KV caches that contain fewer tokens than the sequence, and record which were pruned and by which context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from tokenprune.core.ledger import Ledger
from tokenprune.engine.gathered import GatheredSequence
from tokenprune.errors import UnsupportedError

_MARK = "_tokenprune_prefill"


@dataclass
class Lease:
    """Whether a pruning context is open. Copies of a cache share it; an unpickled one is closed."""

    open: bool = True
    pickled: bool = False

    def __deepcopy__(self, memo: Any) -> Lease:
        return self

    def __reduce__(self) -> Any:
        return Lease, (False, True)


class CachedPrefill:
    """The prefill that filled a cache; stored on the cache and its copies.

    Args:
        lease: state of the context.
        length: S, positions of a row, padding included.
        ledger: ledger of the prefill.
        drafted: how many of the last positions are of drafted answers: later steps count them as decoded.
    """

    def __init__(self, lease: Lease, length: int, ledger: Ledger, drafted: int = 0) -> None:
        self.lease, self.length, self.ledger, self.drafted = lease, length, ledger, drafted

    def __deepcopy__(self, memo: Any) -> CachedPrefill:
        return self  # a copied cache belongs to the same prefill

    def sign(self, cache: Any) -> None:
        """Store on a cache that this prefill filled it."""
        setattr(cache, _MARK, self)

    @staticmethod
    def of(cache: Any) -> CachedPrefill | None:
        """The prefill that filled a cache; None if it was filled without pruning or has been emptied since."""
        known: CachedPrefill | None = getattr(cache, _MARK, None)
        layers = [own for own in getattr(cache, "layers", ()) if isinstance(own, PrunedCacheLayer)]
        return known if all(own.prefill is known for own in layers) else None

    def refusal(self) -> UnsupportedError:
        """The error for a call that is not pruned, or is pruned by another context, and continues this cache."""
        if self.lease.open:
            return UnsupportedError(
                "this KV cache was filled under tokenprune.prune(), but the call that continues it is not pruned: it "
                "uses another model, or runs in a thread that the context does not cover; continue with pruned calls"
            )
        if self.lease.pickled:
            return UnsupportedError(
                "this KV cache was filled under tokenprune.prune(), then pickled and loaded, which detached it from "
                "its context; use copy.deepcopy() and continue inside the context instead"
            )
        return UnsupportedError(
            "this KV cache, or its original, was filled under tokenprune.prune(), whose context is closed; continue "
            "generating inside the context"
        )


class PrunedCacheLayer(DynamicLayer):
    """A dynamic layer whose `get_seq_length` includes pruned tokens, so that later positions and masks stay correct.

    If any layer of a cache lacks tokens, all are of this class, so that the first one refuses an unsupported call
    before anything is changed. An emptied layer behaves like a `DynamicLayer`.

    Args:
        frame: the positions of the prefill that it contains; None = all.
        renumbered: int64 [batch], the number of positions in each row when they were renumbered; None = they were not.
        prefill: the prefill that fills it; None once it is emptied.

    Attributes:
        expected: whether an update by the pruned model is expected.
    """

    def __init__(self, frame: GatheredSequence | None, renumbered: Tensor | None, prefill: CachedPrefill) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.frame, self.renumbered = frame, renumbered
        self.prefill: CachedPrefill | None = prefill
        self.expected = False

    @property
    def absent(self) -> int:
        """Number of positions of the sequence that it does not contain."""
        return 0 if self.frame is None else self.frame.length - self.frame.width

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append; refused outside a pruned call, which alone knows which keys each row has."""
        if self.prefill is not None:
            if not (self.expected and self.prefill.lease.open):
                raise self.prefill.refusal()
            self.expected = False
        return super().update(key_states, value_states, *args, **kwargs)

    def reset(self) -> None:
        """Empty it."""
        super().reset()
        if not super().get_seq_length():  # older releases of transformers keep the length and set zeros
            self.frame = self.renumbered = self.prefill = None

    def get_seq_length(self) -> int:
        """The true sequence length: tokens in the layer plus pruned tokens."""
        held = super().get_seq_length()
        # transformers derives the next position and the width of its masks from this
        return held + self.absent if held else 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder rows (beam search)."""
        super().reorder_cache(beam_idx)
        self._take(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        if self.frame is not None:
            # the frame must follow, since each row has its own fillers, which masks hide
            self._take(torch.arange(len(self.frame.index)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows."""
        super().batch_select_indices(indices)
        self._take(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens decoded since the prefill.

        Args:
            tokens_to_remove: their number, negative; older transformers pass the remaining length, positive.

        Raises:
            UnsupportedError: some of them belong to the prefill.
        """
        if self.prefill is None:
            super().crop(tokens_to_remove)
            return
        length = self.get_seq_length()
        left = length + tokens_to_remove if tokens_to_remove <= 0 else min(tokens_to_remove, length)
        if length and left < self.prefill.length:
            raise UnsupportedError(
                f"cannot crop the KV cache to {left} of {length} tokens: {self.prefill.length} of them belong to a "
                "prefill under tokenprune.prune(), and only tokens decoded since can be removed; start with an empty "
                "cache"
            )
        if left < length:  # not by the base class, which in older releases uses the true length
            assert self.keys is not None
            assert self.values is not None
            held = left - self.absent
            self.keys, self.values = self.keys[..., :held, :], self.values[..., :held, :]

    def _take(self, rows: Tensor) -> None:
        if self.frame is not None:
            self.frame = self.frame.rows(rows)
        if self.renumbered is not None:
            self.renumbered = self.renumbered[rows.to(self.renumbered.device)]


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
        lengths.add(int(own.get_seq_length()))
    lengths.discard(0)  # a layer that shares keys and values of another is empty
    if len(lengths) > 1:
        raise UnsupportedError(
            f"the layers of the KV cache have {', '.join(map(str, sorted(lengths)))} tokens, expected the same number "
            "in all; some were modified, or a call failed: start with an empty cache"
        )
    return held


def is_pruned(cache: Any) -> bool:
    """True if layers of a cache lack tokens that were pruned."""
    return any(isinstance(own, PrunedCacheLayer) for own in getattr(cache, "layers", ()))


def check_cache(cache: Any) -> None:
    """Refuse a cache that the engine cannot prune.

    Raises:
        UnsupportedError: the cache is not a `DynamicCache`.
    """
    if not isinstance(cache, Cache) or any(type(own) not in _REPLACEABLE for own in cache.layers):
        kinds = sorted({type(own).__name__ for own in getattr(cache, "layers", [])}) or [type(cache).__name__]
        raise UnsupportedError(
            f"KV cache of type {', '.join(kinds)} is not supported under tokenprune.prune(), expected a DynamicCache"
        )


def clear(cache: Cache) -> None:
    """Remove all traces of an earlier prefill from an empty cache."""
    cache.__dict__.pop(_MARK, None)
    for number, own in enumerate(cache.layers):
        if isinstance(own, PrunedCacheLayer):
            cache.layers[number] = DynamicLayer()


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
    return known


def shorten_layer(
    cache: Cache, number: int, frame: GatheredSequence, renumbered: Tensor | None, prefill: CachedPrefill
) -> None:
    """Replace the still empty layer `number` of a cache by one for a shortened sequence."""
    layer = PrunedCacheLayer(frame, renumbered, prefill)
    layer.expected = True
    # a slice, since a cache without a config creates its layers one by one
    cache.layers[number : number + 1] = [layer]


def end_update(cache: Any) -> None:
    """Expect no further updates of a cache after a call, which may have failed before it updated all layers."""
    for own in getattr(cache, "layers", ()):
        if isinstance(own, PrunedCacheLayer):
            own.expected = False


def unify_layers(cache: Cache, valid: Tensor, prefill: CachedPrefill) -> None:
    """Convert the other layers of a filled cache, some of whose layers lack tokens, to `PrunedCacheLayer`.

    Sliding-window layers then receive masks of the true length, as pruned layers do.

    Args:
        cache: the cache, filled by a prefill.
        valid: bool [batch, S], False on padding.
        prefill: the prefill that filled it.
    """
    layers: list[Any] = cache.layers
    for number, own in enumerate(layers):
        if isinstance(own, PrunedCacheLayer) or own.keys is None:
            continue
        keys, values, frame = own.keys, own.values, None
        if isinstance(own, DynamicSlidingWindowLayer):
            # it contains only the last positions, the same in all rows, as if the earlier ones had been pruned
            last = torch.zeros(valid.shape, dtype=torch.bool)
            last[:, valid.shape[1] - keys.shape[-2] :] = True
            frame = GatheredSequence.of(last).to(valid.device)
        layer = PrunedCacheLayer(frame, None, prefill)
        # lazy_initialization() has another signature in older releases of transformers
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
        layer.keys, layer.values = keys, values
        layers[number] = layer


_REPLACEABLE = (DynamicLayer, DynamicSlidingWindowLayer, PrunedCacheLayer)
