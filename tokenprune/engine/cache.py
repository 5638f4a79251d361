"""A KV-cache layer that holds fewer tokens than the sequence has, and still knows the true length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from tokenprune.errors import UnsupportedError


@dataclass
class Lease:
    """Whether the pruning context that made a cache is still open."""

    open: bool = True


class PrunedCacheLayer(DynamicLayer):
    """A dynamic layer whose `get_seq_length` counts pruned tokens too, so that next positions and masks stay right.

    Attributes:
        absent: tokens of the sequence that this layer does not hold.
    """

    def __init__(self, lease: Lease) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.absent = 0
        self._lease = lease

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append; refused once the pruning context is closed, since only it knows which keys belong to which row."""
        if not self._lease.open:
            raise UnsupportedError(
                "this KV cache was filled under tokenprune.prune(), whose context is closed; go on generating "
                "inside the context"
            )
        return super().update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self) -> int:
        """The true sequence length: what the layer holds and what was pruned."""
        held = super().get_seq_length()
        return held + self.absent if held else 0

    def reset(self) -> None:
        """Empty the layer."""
        self.absent = 0
        super().reset()

    def reorder_cache(self, beam_idx: Tensor) -> NoReturn:
        """Beam search is not supported."""
        self._refuse("beam search")

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Cropping (assisted decoding) is not supported."""
        self._refuse("assisted decoding")

    def batch_repeat_interleave(self, repeats: int) -> NoReturn:
        """Repeating rows after prefill is not supported."""
        self._refuse("repeating the rows of a filled cache")

    def batch_select_indices(self, indices: Tensor) -> NoReturn:
        """Selecting rows (contrastive search) is not supported."""
        self._refuse("selecting rows of a filled cache")

    def _refuse(self, what: str) -> NoReturn:
        raise UnsupportedError(f"{what} is not supported under tokenprune.prune(); use greedy search or sampling")


def check_cache(cache: Any) -> None:
    """Refuse what the engine cannot prune.

    Raises:
        UnsupportedError: a cache of another kind, or one that already holds tokens.
    """
    if not isinstance(cache, Cache) or any(type(own) not in _REPLACEABLE for own in cache.layers):
        kinds = sorted({type(own).__name__ for own in getattr(cache, "layers", [])}) or [type(cache).__name__]
        raise UnsupportedError(
            f"KV cache of kind {', '.join(kinds)} found under tokenprune.prune(), expected a DynamicCache"
        )
    held: list[Any] = cache.layers
    if any(own.get_seq_length() for own in held):
        raise UnsupportedError(
            "the KV cache already holds tokens from outside this pruning context; start with an empty cache "
            "inside the context"
        )


def shorten_layer(cache: Cache, number: int, absent: int, lease: Lease) -> None:
    """Make layer `number` of a cache, still empty there, one that will lack `absent` tokens of the sequence."""
    layer = PrunedCacheLayer(lease)
    layer.absent = absent
    cache.layers[number : number + 1] = [layer]  # a cache without a config makes its layers one by one


def widen_window(cache: Cache, number: int, lease: Lease) -> int | None:
    """Turn a filled sliding-window layer into one whose masks have the true length, as those of pruned layers have.

    Returns:
        The number of tokens that it holds, the last ones; None for a layer of another kind, which stays.
    """
    window: Any = cache.layers[number]
    if not isinstance(window, DynamicSlidingWindowLayer):
        return None
    layer, keys, values = PrunedCacheLayer(lease), window.keys, window.values
    assert keys is not None
    assert values is not None
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    held = keys.shape[-2]
    layer.absent = int(window.get_seq_length()) - held
    cache.layers[number] = layer
    return held


_REPLACEABLE = (DynamicLayer, DynamicSlidingWindowLayer, PrunedCacheLayer)
