"""The engine's view of a model: its decoder, its image tokens and its vision side.

Adapters for live models derive from `BoundModel` and `VisionCapture`, so that users need not mark image tokens.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from tokenprune.core.reads import Read
from tokenprune.engine.interface.prompt_masks import PromptMasks
from tokenprune.engine.sequence.gathered import visible


class VisionCapture(ABC):
    """Observes the model's calls while a context is open, and provides image tokens and reads of each prefill."""

    @abstractmethod
    def prompt_masks(self, queries: Mapping[str, Tensor]) -> PromptMasks:
        """Masks of the current prefill, with its image tokens. Called when its first decoder layer begins.

        Args:
            queries: named query rows from the caller of `tokenprune.prune`, to be included in the result.
        """

    @abstractmethod
    def provide(self, read: Read) -> Any:
        """The value of a read of the vision side, aligned with the image tokens of the current prefill."""

    def later(self) -> Tensor | None:
        """Called in a later turn on a filled cache: bool [batch, new], image tokens among the new ones; None = none.

        If there are any, `prompt_masks` and `provide` are called as in a prefill, with the turn's images.
        """
        return None

    def missed(self) -> bool:
        """Called with each call of the decoder: whether it belongs to a call of the model that began before the context
        was opened, for example in another thread."""
        return False

    def padding(self) -> Tensor | None:
        """Called on a filled cache: the two-dimensional attention mask of the model's call, if its decoder receives a
        different one; None = the decoder's own argument."""
        return None


class BoundModel(ABC):
    """A live model as its adapter describes it, created by `Adapter.bind`; or a model class of the adapter itself.

    Attributes:
        name: name of the model, for messages.
        decoder: the module that runs the decoder layers.
        tower_layers: number of layers of the vision tower.
        source: the adapter and its package, for messages; set by tokenprune.
    """

    name: str
    decoder: nn.Module
    tower_layers: int
    source: str = ""

    @abstractmethod
    def offers(self) -> frozenset[type[Read]]:
        """The kinds of reads that the vision side provides."""

    @abstractmethod
    def capture(self, reads: Collection[Read]) -> AbstractContextManager[VisionCapture]:
        """Observe the model's calls while the context is open, and keep the data for these reads.

        Raises:
            UnsupportedError: the model cannot be observed.
        """


def arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `module.forward`, by name."""
    given = inspect.signature(module.forward).bind_partial(*args).arguments if args else {}
    return {**given, **kwargs}


def padding_mask(inputs: Mapping[str, Any]) -> Tensor | None:
    """The two-dimensional attention mask among a model's arguments, [batch, tokens so far], or None.

    From a four-dimensional one, which `generate` makes for static caches, the keys that any query sees.
    """
    mask = inputs.get("attention_mask")
    if isinstance(mask, Mapping):  # by type of layer
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        return None
    return mask if mask.dim() == 2 else _seen_keys(mask, inputs)


def _seen_keys(mask: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """bool [batch, tokens so far] of a mask [batch or 1, heads or 1, queries, tokens so far or more]."""
    seen = visible(mask)
    cache = inputs.get("past_key_values")
    length = mask.shape[2] + (0 if cache is None else int(cache.get_seq_length()))
    ids = inputs.get("input_ids")
    batch = len(inputs["inputs_embeds"] if ids is None else ids)
    return seen[:, 0, :, :length].any(1).expand(batch, -1)
