"""The base class of adapters, which recognise a family's checkpoints and load them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from tokenprune.loading.model_support import ModelSupport

if TYPE_CHECKING:
    from tokenprune.engine.interface.bound_model import BoundModel


class Adapter(ABC):
    """Base class of adapters. An adapter is never instantiated; `load` returns the model.

    Attributes:
        model_types: `model_type`s of the live models that `bind` knows, for messages.
        merges_lora: whether `load` merges the adapter of a folder with adapter_config.json (see
            `tokenprune.loading.lora_folders`); if not, such folders are refused.

    Examples:
        >>> import tokenprune as tp
        >>> class MyAdapter(tp.Adapter):
        ...     @classmethod
        ...     def matches(cls, source, config):
        ...         return config.get("model_type") == "my-model"
        ...
        ...     @classmethod
        ...     def load(cls, source, **options):
        ...         return MyModel.from_pretrained(source, **options)
        >>> MyAdapter.matches("path/to/checkpoint", {"model_type": "my-model"})
        True
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    merges_lora: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def matches(cls, source: str, config: Mapping[str, Any]) -> bool:
        """Whether this adapter can load the checkpoint.

        Args:
            source: folder or hub id.
            config: the checkpoint's parsed `config.json`.
        """

    @classmethod
    @abstractmethod
    def load(cls, source: str, **options: Any) -> Any:
        """Load the checkpoint.

        Args:
            source: folder or hub id.
            options: what the user passed to `tokenprune.load`, e.g. `dtype`, `device`, `vision_tower`.

        Raises:
            CheckpointError: the checkpoint is damaged or incomplete.
            OptionError: an option that this family does not have.
        """

    @classmethod
    def bind(cls, model: Any) -> BoundModel | None:
        """The `BoundModel` of a live model, for `tokenprune.prune(model, strategy)`; None for a model of another kind.

        Args:
            model: any model object.
        """
        return None

    @classmethod
    def model_support(cls, model_type: str | None = None) -> Sequence[ModelSupport]:
        """The types of models that this adapter supports, and those that it refuses with a reason.

        `tokenprune list --models` shows them; `tokenprune.load` and `tokenprune.prune` refuse a model with the reason
        that is given here. By default every type of `model_types` is supported.

        Args:
            model_type: the only type that is asked for; None = all.
        """
        return [ModelSupport(kind) for kind in cls.model_types if model_type in (None, kind)]
