"""Which checkpoints are Voxtral's, and how they are loaded and recognised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import VoxtralForConditionalGeneration

from tokenprune import Adapter
from tokenprune.engine import BoundModel
from tokenprune.errors import CheckpointError, OptionError
from tokenprune_voxtral.binding import VoxtralBinding

MODEL_TYPE = "voxtral"
LOAD_OPTIONS = ("dtype", "device")


class VoxtralAdapter(Adapter):
    """Models whose `model_type` is `voxtral`: Voxtral Mini and Small."""

    model_types = (MODEL_TYPE,)

    @classmethod
    def matches(cls, source: str, config: Mapping[str, Any]) -> bool:
        """By the model type."""
        return config.get("model_type") == MODEL_TYPE

    @classmethod
    def load(cls, source: str, **options: Any) -> Any:
        """The model, ready for `tokenprune.prune`.

        Raises:
            CheckpointError: transformers cannot load the folder.
            OptionError: an option other than `dtype` and `device`.
        """
        for name in options:
            if name not in LOAD_OPTIONS:
                raise OptionError(f"Voxtral models have no load option {name!r}; options: {', '.join(LOAD_OPTIONS)}")
        try:
            model: Any = VoxtralForConditionalGeneration.from_pretrained(source, dtype=options.get("dtype"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{source}: transformers cannot load it: {error}") from error
        return model.to(options.get("device") or "cpu").eval()

    @classmethod
    def bind(cls, model: Any) -> BoundModel | None:
        """Of a live model, with or without its language-model head; None for others."""
        base = getattr(model, "model", model)
        known = getattr(getattr(model, "config", None), "model_type", None) == MODEL_TYPE
        return VoxtralBinding(base) if known and hasattr(base, "multi_modal_projector") else None
