"""KV caches that hold fewer tokens than the sequence has, and know what was left out and by which context."""

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
    """Whether a pruning context is still open. Copies of a cache share it; a pickled one comes back as closed."""

    open: bool = True
    pickled: bool = False

    def __deepcopy__(self, memo: Any) -> Lease:
        return self

    def __reduce__(self) -> Any:
        return Lease, (False, True)


class CachedPrefill:
    """The prefill that filled a cache; carried by the cache, and by every copy of it.

    Args:
        lease: of the context.
        length: S, positions of a row, padding included.
        ledger: of the prefill.
    """

    def __init__(self, lease: Lease, length: int, ledger: Ledger) -> None:
        self.lease, self.length, self.ledger = lease, length, ledger

    def __deepcopy__(self, memo: Any) -> CachedPrefill:
        return self  # a copied cache is of the same prefill

    def sign(self, cache: Any) -> None:
        """Note on a cache that this prefill filled it."""
        setattr(cache, _MARK, self)

    @staticmethod
    def of(cache: Any) -> CachedPrefill | None:
        """The one that filled a cache; None where it was filled without pruning, also after it was emptied."""
        known: CachedPrefill | None = getattr(cache, _MARK, None)
        layers = [own for own in getattr(cache, "layers", ()) if isinstance(own, PrunedCacheLayer)]
        return known if all(own.prefill is known for own in layers) else None

    def refusal(self) -> UnsupportedError:
        """Why a call that is not pruned, or one of another context, may not continue its cache."""
        if self.lease.open:
            return UnsupportedError(
                "this KV cache was filled under tokenprune.prune(), but the call that continues it is not pruned: it "
                "is of another model, or in a thread that the context is not for; continue with calls that are pruned"
            )
        if self.lease.pickled:
            return UnsupportedError(
                "this KV cache was filled under tokenprune.prune(), then pickled and read back, by which it left its "
                "context; continue a copy.deepcopy() of it inside the context instead"
            )
        return UnsupportedError(
            "this KV cache, or the one that it was copied from, was filled under tokenprune.prune(), whose "
            "context is closed; continue generating inside the context"
        )


class PrunedCacheLayer(DynamicLayer):
    """A dynamic layer whose `get_seq_length` counts pruned tokens too, so that next positions and masks stay right.

    All layers of a cache are of this kind once any of them lacks tokens, so that each refuses what one has to refuse,
    before anything is changed. An emptied one is a plain dynamic layer.

    Args:
        frame: the positions of the prefill that it holds; None = all.
        renumbered: int64 [batch], how many positions a row had when they were renumbered; None = never.
        prefill: the one that fills it; None once it is emptied.

    Attributes:
        expected: whether the pruned model is about to update it.
    """

    def __init__(self, frame: GatheredSequence | None, renumbered: Tensor | None, prefill: CachedPrefill) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.frame, self.renumbered = frame, renumbered
        self.prefill: CachedPrefill | None = prefill
        self.expected = False

    @property
    def absent(self) -> int:
        """Positions of the sequence that it does not hold."""
        return 0 if self.frame is None else self.frame.length - self.frame.width

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append; refused where it is not a pruned call that does so, since only its run knows which keys a row has."""
        if self.prefill is not None:
            if not (self.expected and self.prefill.lease.open):
                raise self.prefill.refusal()
            self.expected = False
        return super().update(key_states, value_states, *args, **kwargs)

    def reset(self) -> None:
        """Empty it."""
        super().reset()
        if not super().get_seq_length():  # older releases of transformers fill it with zeros
            self.frame = self.renumbered = self.prefill = None

    def get_seq_length(self) -> int:
        """The true sequence length: what the layer holds and what was pruned."""
        held = super().get_seq_length()
        return held + self.absent if held else 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Rows in another order (beam search)."""
        super().reorder_cache(beam_idx)
        self._take(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row several times."""
        super().batch_repeat_interleave(repeats)
        if self.frame is not None:
            self._take(torch.arange(len(self.frame.index)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows."""
        super().batch_select_indices(indices)
        self._take(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back tokens decoded since the prefill.

        Args:
            tokens_to_remove: how many, negative; older releases of transformers give the length that stays, positive.

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
                f"the KV cache is to be cut to {left} of {length} tokens, and {self.prefill.length} of them are of a "
                "prefill under tokenprune.prune(); only tokens decoded since can be taken back: start with "
                "an empty cache"
            )
        if left < length:  # not by the base class, whose older releases take the true length for the one that is held
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
    """Tokens per row that a cache holds, those that were pruned included; 0 where there is none.

    Raises:
        UnsupportedError: the layers disagree, so that somebody changed some of them, or a call did not come to its end.
    """
    if cache is None:
        return 0
    held = int(cache.get_seq_length())
    lengths = {int(own.get_seq_length()) for own in getattr(cache, "layers", ())} - {0}  # 0: shares another's
    if len(lengths) > 1:
        raise UnsupportedError(
            f"the layers of the KV cache hold {', '.join(map(str, sorted(lengths)))} tokens, expected the same number "
            "in all; some were changed by hand, or by a call that failed: start with an empty cache"
        )
    return held


def is_pruned(cache: Any) -> bool:
    """Whether layers of a cache lack tokens that were pruned."""
    return any(isinstance(own, PrunedCacheLayer) for own in getattr(cache, "layers", ()))


def check_cache(cache: Any) -> None:
    """Refuse a cache that the engine cannot prune.

    Raises:
        UnsupportedError: a cache of another kind.
    """
    if not isinstance(cache, Cache) or any(type(own) not in _REPLACEABLE for own in cache.layers):
        kinds = sorted({type(own).__name__ for own in getattr(cache, "layers", [])}) or [type(cache).__name__]
        raise UnsupportedError(
            f"KV cache of kind {', '.join(kinds)} found under tokenprune.prune(), expected a DynamicCache"
        )


def clear(cache: Cache) -> None:
    """Make an empty cache one that knows of no prefill, whatever it held before."""
    cache.__dict__.pop(_MARK, None)
    for number, own in enumerate(cache.layers):
        if isinstance(own, PrunedCacheLayer):
            cache.layers[number] = DynamicLayer()


def check_known(known: CachedPrefill | None, lease: Lease) -> CachedPrefill:
    """Refuse a filled cache that does not belong to the open context.

    Raises:
        UnsupportedError: it was filled elsewhere.
    """
    if known is None:
        raise UnsupportedError(
            "the KV cache already holds tokens from outside this pruning context, so nothing in it was pruned; start "
            "with an empty cache inside the context"
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
    """Make layer `number` of a cache, still empty there, one that will hold a frame of the sequence only."""
    layer = PrunedCacheLayer(frame, renumbered, prefill)
    layer.expected = True
    # a slice, since a cache without a config makes its layers one by one
    cache.layers[number : number + 1] = [layer]


def expect_nothing(cache: Any) -> None:
    """The call that was to update a cache is over, whether it came so far or not."""
    for own in getattr(cache, "layers", ()):
        if isinstance(own, PrunedCacheLayer):
            own.expected = False


def take_over(cache: Cache, valid: Tensor, prefill: CachedPrefill) -> None:
    """Once a prefill has filled a cache, some of whose layers lack tokens: make the others layers of the same kind.

    Those of sliding windows are given masks of the true length then, as those of pruned layers are.

    Args:
        cache: filled by a prefill.
        valid: bool [batch, S], the prefill's.
        prefill: the one that filled it.
    """
    layers: list[Any] = cache.layers
    for number, own in enumerate(layers):
        if isinstance(own, PrunedCacheLayer) or own.keys is None:
            continue
        keys, values, frame = own.keys, own.values, None
        if isinstance(own, DynamicSlidingWindowLayer):
            last = torch.zeros_like(valid)
            last[:, valid.shape[1] - keys.shape[-2] :] = True
            frame = GatheredSequence.of(last)
        layer = PrunedCacheLayer(frame, None, prefill)
        # not by lazy_initialization(), which takes other arguments in older releases of transformers
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
        layer.keys, layer.values = keys, values
        layers[number] = layer


_REPLACEABLE = (DynamicLayer, DynamicSlidingWindowLayer, PrunedCacheLayer)
