"""What an adapter is: the class that recognises a family's checkpoints and loads them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any


class Adapter(ABC):
    """Base class of adapters. An adapter is never instantiated; `load` returns the model."""

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
