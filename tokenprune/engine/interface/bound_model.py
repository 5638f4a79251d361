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
from tokenprune.engine.gathered import visible
from tokenprune.engine.interface.prompt_masks import PromptMasks
from tokenprune.errors import InputError, OptionError, UnsupportedError
from tokenprune.plugins import registry
from tokenprune.plugins.entries import not_loaded
from tokenprune.utils.arguments import shown


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
        """Called in a later turn on a filled cache: bool [batch, new], image tokens among the new ones; None = none."""
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


def bound_model_of(model: Any) -> BoundModel:
    """Bind a live model with the first installed adapter that supports it; errors name the adapter.

    A `BoundModel` is returned as it is. Adapters are imported and tried in the order of registration, so that the
    result depends only on what is installed; those after the first match are not imported.

    Raises:
        InputError: a plain language model, whose image tokens the caller must mark.
        OptionError: not a model.
        UnsupportedError: no adapter supports the model, or it is pruned through its own `segment`.
        PluginError: an adapter cannot be imported, raises, or returns an object of the wrong type.
    """
    from tokenprune.engine.interface.checked_model import CheckedBoundModel

    if isinstance(model, BoundModel):
        return model
    asked: dict[str, Any] = {}
    for name, entry in registry.adapters().items():
        asked[name] = entry.load()
        bound = entry.call(model, method="bind")
        if isinstance(bound, BoundModel):
            return CheckedBoundModel(bound, entry)
        if bound is not None:
            raise entry.refusal(f"returned {bound!r} from bind(), expected a BoundModel or None", "fix or uninstall it")
    if hasattr(model, "segment") and not isinstance(model, type):
        raise UnsupportedError(
            f"{type(model).__name__} is pruned through its own methods; call its segment(image, query, strategy=…), or "
            "pass its decoder to tokenprune.prune(), with image_tokens="
        )
    if not isinstance(model, nn.Module):
        name = f", such as tokenprune.load({model!r})" if isinstance(model, str) else ""
        raise OptionError(
            f"model={shown(model)} found, expected a torch.nn.Module or the result of tokenprune.load(){name}"
        )
    config = getattr(model, "config", None)
    if getattr(config, "vision_config", None) is None:
        raise InputError(
            f"{type(model).__name__}: where are the image tokens? Pass image_tokens=, a bool [batch, sequence] "
            "mask over the decoder's input"
        )
    families = "; ".join(
        f"{name}: {', '.join(adapter.model_types)}" for name, adapter in asked.items() if adapter.model_types
    )
    raise UnsupportedError(
        f"no adapter knows the model {type(model).__name__} (model_type {getattr(config, 'model_type', None)!r}); "
        f"adapters know {families or 'no live models'}; mark its image tokens with image_tokens= to prune it anyway, "
        f"or write an adapter{not_loaded(registry.broken_plugins())}"
    )
