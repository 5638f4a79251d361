"""The engine's view of a model: its decoder, its image tokens and its vision side.

Adapters for live models derive from `BoundModel` and `VisionCapture`; users of such models need not mark image tokens.
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
from tokenprune.errors import InputError, OptionError, UnsupportedError
from tokenprune.plugins import registry
from tokenprune.plugins.entries import not_loaded
from tokenprune.utils.arguments import shown


class VisionCapture(ABC):
    """Follows a model while it takes in images, and reports afterwards what it saw."""

    @abstractmethod
    def prompt_masks(self, queries: Mapping[str, Tensor]) -> PromptMasks:
        """Where the image tokens of the present prefill stand. Called when its first decoder layer begins.

        Args:
            queries: query rows that the caller of `tokenprune.prune` named; to be handed on.
        """

    @abstractmethod
    def provide(self, read: Read) -> Any:
        """The answer to a read of the vision side, aligned with the image tokens of the present prefill."""

    def later(self) -> Tensor | None:
        """Called in a later turn on a filled cache: bool [batch, new], the image tokens among the new ones; None =
        there are none."""
        return None

    def missed(self) -> bool:
        """Called when the decoder is: whether that is in a call of the model that began before the context was opened,
        as other threads' may."""
        return False

    def padding(self) -> Tensor | None:
        """Called on a filled cache: the two-dimensional attention mask of the call, where the model gives its decoder
        another one; None = what the decoder itself is called with."""
        return None


class BoundModel(ABC):
    """A live model, wrapped by the adapter of its family; made by `Adapter.bind`. Or a model of an adapter's own.

    Attributes:
        name: of the model, for messages.
        decoder: the module that runs the decoder layers.
        tower_layers: layers of the vision tower.
        source: the adapter and its package, for messages; tokenprune sets it.
    """

    name: str
    decoder: nn.Module
    tower_layers: int
    source: str = ""

    @abstractmethod
    def offers(self) -> frozenset[type[Read]]:
        """Kinds of reads that the vision side can answer."""

    @abstractmethod
    def capture(self, reads: Collection[Read]) -> AbstractContextManager[VisionCapture]:
        """Follow the model's calls while the context is open, and keep the data for these reads.

        Raises:
            UnsupportedError: the model cannot be followed.
        """


def arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `module.forward`, by name."""
    given = inspect.signature(module.forward).bind_partial(*args).arguments if args else {}
    return {**given, **kwargs}


def padding_mask(inputs: Mapping[str, Any]) -> Tensor | None:
    """The two-dimensional attention mask among a model's arguments, if there is one."""
    mask = inputs.get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def bound_model_of(model: Any) -> BoundModel:
    """A live model as the first installed adapter that knows it binds it; failures name the adapter.

    A model of an adapter's own that is a `BoundModel` itself is given back.

    Adapters are imported and asked one by one, in the order of registration, so that the answer depends on what is
    installed alone. Those after the first that knows the model are not imported.

    Raises:
        InputError: a plain language model, whose image tokens the caller has to mark.
        OptionError: no model at all.
        UnsupportedError: a vision-language model that no adapter knows, or one that is pruned by its own `segment`.
        PluginError: an adapter that was to be asked cannot be imported, raises, or answers with something else.
    """
    from tokenprune.engine.interface.guarded import Guarded

    if isinstance(model, BoundModel):
        return model
    asked: dict[str, Any] = {}
    for name, entry in registry.adapters().items():
        asked[name] = entry.load()
        bound = entry.call(model, method="bind")
        if isinstance(bound, BoundModel):
            return Guarded(bound, entry)
        if bound is not None:
            raise entry.refusal(f"answers bind() with {bound!r}, expected a BoundModel or None", "fix or uninstall it")
    if hasattr(model, "segment") and not isinstance(model, type):
        raise UnsupportedError(
            f"{type(model).__name__} is pruned by its own methods; call segment(image, query, strategy=…) on it, or "
            "hand its decoder to tokenprune.prune(), with image_tokens="
        )
    if not isinstance(model, nn.Module):
        name = f", as in tokenprune.load({model!r})" if isinstance(model, str) else ""
        raise OptionError(
            f"model={shown(model)} found, expected a model: a torch.nn.Module, or what tokenprune.load() gives{name}"
        )
    config = getattr(model, "config", None)
    if getattr(config, "vision_config", None) is None:
        raise InputError(
            f"{type(model).__name__}: where are the image tokens? Give image_tokens=, a bool [batch, sequence] "
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
