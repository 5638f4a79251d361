"""Recognising, loading and following transformers' own vision-language models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenprune.adapter import Adapter
from tokenprune_adapters.transformers_vlm.binding import TransformersBinding
from tokenprune_adapters.transformers_vlm.families import FAMILIES


class TransformersAdapter(Adapter):
    """LLaVA, Qwen-VL, InternVL, SmolVLM, PaliGemma, Gemma 3 and their relatives, as transformers has them."""

    model_types = tuple(FAMILIES)

    @classmethod
    def matches(cls, source: str, config: Mapping[str, Any]) -> bool:
        """Whether config.json is that of a known family, saved by transformers."""
        names = config.get("architectures") or ()
        return config.get("model_type") in FAMILIES and any(
            str(name).endswith("ForConditionalGeneration") for name in names
        )

    @classmethod
    def bind(cls, model: Any) -> TransformersBinding | None:
        """A live model of a known family, with its language-modelling head or without."""
        base = getattr(model, "base_model", None)
        kind = getattr(getattr(base, "config", None), "model_type", None)
        if kind not in FAMILIES or not hasattr(base, "get_image_features"):
            return None
        return TransformersBinding(base, FAMILIES[kind])

    @classmethod
    def load(cls, source: str, **options: Any) -> Any:
        raise NotImplementedError
