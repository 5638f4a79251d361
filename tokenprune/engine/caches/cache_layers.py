"""Layers of KV caches that lack pruned tokens, and the record of the prefill that filled them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, StaticLayer

from tokenprune.core.ledger import Ledger
from tokenprune.engine.sequence.gathered import GatheredSequence
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
        max_cache_len: of a static cache; None = the cache grows.
        keeps_states: whether some layers keep a state, which no call can undo.

    Attributes:
        failed: whether a step failed that may have filled some layers only.
    """

    def __init__(
        self,
        lease: Lease,
        length: int,
        ledger: Ledger,
        drafted: int = 0,
        max_cache_len: int | None = None,
        keeps_states: bool = False,
    ) -> None:
        self.lease, self.length, self.ledger, self.drafted = lease, length, ledger, drafted
        self.max_cache_len, self.keeps_states = max_cache_len, keeps_states
        self.failed = False

    def extended(self, length: int, ledger: Ledger) -> CachedPrefill:
        """The record of a cache that has been continued to so many positions."""
        return CachedPrefill(
            self.lease, length, ledger, max_cache_len=self.max_cache_len, keeps_states=self.keeps_states
        )

    def check_room(self, length: int) -> None:
        """Raise UnsupportedError if the cache is too short for that many positions."""
        if self.max_cache_len is not None and length > self.max_cache_len:
            raise UnsupportedError(
                f"the StaticCache is too short: max_cache_len={self.max_cache_len}, but this call needs {length} "
                "tokens per row; create the cache with a larger max_cache_len"
            )

    def __deepcopy__(self, memo: Any) -> CachedPrefill:
        return self  # a copied cache belongs to the same prefill

    def sign(self, cache: Any) -> None:
        """Store on a cache that this prefill filled it."""
        setattr(cache, _MARK, self)

    @staticmethod
    def erase(cache: Any) -> None:
        """Remove that from an emptied cache."""
        cache.__dict__.pop(_MARK, None)

    @staticmethod
    def of(cache: Any) -> CachedPrefill | None:
        """The prefill that filled a cache; None if it was filled without pruning or has been emptied since."""
        known: CachedPrefill | None = getattr(cache, _MARK, None)
        layers = [own for own in getattr(cache, "layers", ()) if isinstance(own, PrunedLayer)]
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


class PrunedLayer(CacheLayerMixin):
    """A cache layer whose `get_seq_length` includes pruned tokens, so that later positions and masks stay correct.

    If any layer of a cache lacks tokens, all are of this class, so that the first one refuses an unsupported call
    before anything is changed. An emptied layer behaves like one of transformers.

    Args:
        frame: the positions of the prefill that it contains; None = all.
        renumbered: int64 [batch], the number of positions in each row when they were renumbered; None = they were not.
        prefill: the prefill that fills it; None once it is emptied.
        options: arguments of transformers' class.

    Attributes:
        expected: whether an update by the pruned model is expected.
        held: tokens per row that it contains, fillers included.
    """

    held: int

    def __init__(
        self, frame: GatheredSequence | None, renumbered: Tensor | None, prefill: CachedPrefill, **options: Any
    ) -> None:
        super().__init__(**options)  # type: ignore[no-untyped-call]
        self.frame, self.renumbered = frame, renumbered
        self.prefill: CachedPrefill | None = prefill
        self.expected = False

    @property
    def absent(self) -> int:
        """Number of positions of the sequence that it does not contain."""
        return 0 if self.frame is None else self.frame.length - self.frame.width

    @property
    def room(self) -> int | None:
        """How many tokens after the prefill it has slots for; None = it grows."""
        return None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append; refused outside a pruned call, which alone knows which keys each row has."""
        if self.prefill is None:
            return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[safe-super]
        if not (self.expected and self.prefill.lease.open):
            self.prefill.failed |= self.prefill.keeps_states  # layers before this one have run
            raise self.prefill.refusal()
        self.expected = False
        return self._append(key_states, value_states)

    def _append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        return super().update(key_states, value_states)  # type: ignore[safe-super]

    def reset(self) -> None:
        """Empty it."""
        super().reset()
        if not self.held:  # older releases of transformers keep the length and set zeros
            self.frame = self.renumbered = self.prefill = None

    def get_seq_length(self) -> int:
        """The true sequence length: tokens in the layer plus pruned tokens."""
        # transformers derives the next position and the width of its masks from this
        return self.held + self.absent if self.held else 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder rows (beam search)."""
        super().reorder_cache(beam_idx)
        self._take(beam_idx)

    def _take(self, rows: Tensor) -> None:
        if self.frame is not None:
            self.frame = self.frame.rows(rows)
        if self.renumbered is not None:
            self.renumbered = self.renumbered[rows.to(self.renumbered.device)]


class PrunedDynamicLayer(PrunedLayer, DynamicLayer):
    """A `PrunedLayer` that grows."""

    @property
    def held(self) -> int:  # type: ignore[override]
        """See `PrunedLayer`."""
        return int(DynamicLayer.get_seq_length(self))

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
            self.prefill.failed |= self.prefill.keeps_states
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


class PrunedStaticLayer(PrunedLayer, StaticLayer):
    """A `PrunedLayer` of fixed size: the M positions of its frame, then one slot for each position that may follow.

    It is `max_cache_len` − (S − M) slots long, so that it saves as much memory as a growing one. Its length is counted
    on the host, since transformers' count on the device would have to be waited for.

    Attributes:
        slots: int64 [new], where the expected update is written; None = it is the prefill.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.held = 0
        self.slots: Tensor | None = None

    @property
    def room(self) -> int:
        """See `PrunedLayer`."""
        assert self.prefill is not None
        return int(self.max_cache_len) - self.prefill.length

    def get_seq_length(self) -> int:
        """See `PrunedLayer`."""
        emptied = self.prefill is None
        return StaticLayer.get_seq_length(self) if emptied else super().get_seq_length()

    def _append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        if self.slots is None:
            # not copied into empty slots yet, which the prefill's queries would have to hide
            self.keys, self.values, self.held = key_states, value_states, key_states.shape[2]
        else:
            assert self.keys is not None
            assert self.values is not None
            self.keys[:, :, self.slots] = key_states
            self.values[:, :, self.slots] = value_states
        return self.keys, self.values

    def hold(self, keys: Tensor, values: Tensor) -> None:
        """Keep the keys and values of the prefill, [batch, heads, M or more, size], in slots of their own."""
        assert self.prefill is not None
        self.held, self.dtype, self.device = self.prefill.length - self.absent, keys.dtype, keys.device
        self.batch_size = self.max_batch_size = len(keys)  # the latter in older releases
        self.num_heads = keys.shape[1]
        self.is_initialized = True
        self.keys, self.values = self._in_slots(keys), self._in_slots(values)

    def _in_slots(self, states: Tensor) -> Tensor:
        length = self.held + self.room
        if states.shape[2] != length:
            slots = states.new_zeros(*states.shape[:2], length, states.shape[3])
            slots[:, :, : self.held] = states[:, :, : self.held]
            states = slots
        torch._dynamo.mark_static_address(states)  # as transformers does, for CUDA graphs
        return states

    def reset(self) -> None:
        """Empty it; the next prefill may need slots for other tokens."""
        self.keys = self.values = self.slots = None
        self.is_initialized, self.held = False, 0
        super().reset()


def drop_behind(own: Any, held: int) -> None:
    """Remove what a growing layer of a cache holds behind its first `held` tokens per row."""
    if own.keys is not None:
        own.keys, own.values = own.keys[..., :held, :], own.values[..., :held, :]
