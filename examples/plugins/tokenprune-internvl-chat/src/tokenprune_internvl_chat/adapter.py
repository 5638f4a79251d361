"""Which checkpoints have InternVL's own code, and how they are loaded and recognised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoModel, AutoTokenizer

from tokenprune import Adapter
from tokenprune.engine import BoundModel
from tokenprune.errors import CheckpointError, OptionError
from tokenprune_internvl_chat.binding import InternVLChatBinding

MODEL_TYPE = "internvl_chat"
CONTEXT = "<IMG_CONTEXT>"
LOAD_OPTIONS = ("dtype", "device", "trust_remote_code")


class InternVLChatAdapter(Adapter):
    """Checkpoints of InternVL 2 to 3.5 whose classes come with them, not those that were converted for transformers."""

    model_types = (MODEL_TYPE,)

    @classmethod
    def matches(cls, source: str, config: Mapping[str, Any]) -> bool:
        """By the model type, which only the authors' format has."""
        return config.get("model_type") == MODEL_TYPE

    @classmethod
    def load(cls, source: str, **options: Any) -> Any:
        """The model with the authors' classes, ready for `tokenprune.prune` and for its own `chat`.

        Raises:
            CheckpointError: transformers cannot load the checkpoint, or its tokenizer has no image token.
            OptionError: an option other than `dtype`, `device`, `trust_remote_code`, or the last is not True.
        """
        for name in options:
            if name not in LOAD_OPTIONS:
                raise OptionError(f"InternVL models have no load option {name!r}; options: {', '.join(LOAD_OPTIONS)}")
        if options.get("trust_remote_code") is not True:
            raise OptionError(
                f"{source} contains code that would run on this machine; read it, and pass trust_remote_code=True"
            )
        try:
            model: Any = AutoModel.from_pretrained(source, trust_remote_code=True, dtype=options.get("dtype"))
            tokenizer: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=True)
        except Exception as error:  # the authors' code may raise anything
            raise CheckpointError(f"{source}: transformers cannot load it: {' '.join(str(error).split())}") from error
        model.img_context_token_id = tokenizer.get_vocab().get(CONTEXT)
        if model.img_context_token_id is None:
            raise CheckpointError(f"{source}: its tokenizer has no {CONTEXT}; use the one of the checkpoint")
        return model.to(options.get("device") or "cpu").eval()

    @classmethod
    def bind(cls, model: Any) -> BoundModel | None:
        """Of a live model with the authors' classes; None for others."""
        known = getattr(getattr(model, "config", None), "model_type", None) == MODEL_TYPE
        return InternVLChatBinding(model) if known and hasattr(model, "img_context_token_id") else None
