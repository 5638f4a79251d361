"""Recognising, loading and following transformers' own vision-language models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import AutoModelForImageTextToText

from tokenprune.adapter import Adapter
from tokenprune.errors import CheckpointError, UnsupportedError
from tokenprune_adapters.load_options import one_place, refuse_unknown, shown_name, torch_device, torch_dtype
from tokenprune_adapters.transformers_vlm.binding import TransformersBinding
from tokenprune_adapters.transformers_vlm.families import FAMILIES
from tokenprune_adapters.transformers_vlm.model import VisionLanguageModel

OPTIONS = ("dtype", "device", "device_map", "attn_implementation", "revision", "quantization_config")
OLDEST = (5, 0)
"""The oldest release of transformers whose models are known here; before it they are built otherwise inside."""


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
        """A live model of a known family, with its language-modelling head or without.

        Raises:
            UnsupportedError: a release of transformers older than `OLDEST`, or a model without a part of its family.
        """
        base = getattr(model, "base_model", None)
        kind = getattr(getattr(base, "config", None), "model_type", None)
        if kind not in FAMILIES or not hasattr(base, "get_image_features"):
            return None
        _refuse_old_releases(type(model).__name__)
        return TransformersBinding(base, FAMILIES[kind])

    @classmethod
    def load(cls, source: str, **options: Any) -> VisionLanguageModel:
        """Load a checkpoint with transformers.

        Args:
            source: folder or hub id.
            options: `dtype` (the stored one by default; float32 on a CPU), `device`, `device_map`,
                `attn_implementation`, `revision`, `quantization_config`: as in transformers.

        Raises:
            CheckpointError: weights are missing, damaged or mis-shaped.
            OptionError: an option that does not exist, or both device= and device_map=.
            UnsupportedError: a release of transformers older than `OLDEST`.
        """
        _refuse_old_releases(source)
        refuse_unknown(options, OPTIONS, "transformers")
        device, device_map = options.pop("device", None), options.get("device_map")
        one_place(device, device_map)
        place = torch_device(device)
        default = torch.float32 if place.type == "cpu" and device_map is None else "auto"
        dtype = torch_dtype(options.pop("dtype", None)) or default
        try:
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                source, dtype=dtype, output_loading_info=True, **options
            )
        except Exception as error:  # what transformers raises on a bad checkpoint is its own business and changes
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{source} cannot be loaded ({type(error).__name__}: {reason})") from error
        model, report = loaded
        missing = sorted(str(name) for name in report["missing_keys"])
        if missing:
            raise CheckpointError(
                f"{source}: {len(missing)} tensors are missing ({', '.join(missing[:3])}, …); fetch all of its "
                "weight files"
            )
        if device_map is None:
            model.to(place)
        return VisionLanguageModel(model.eval(), source, shown_name(source), options.get("revision"))


def _refuse_old_releases(name: str) -> None:
    found, oldest = transformers.__version__, ".".join(map(str, OLDEST))
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        raise UnsupportedError(
            f"{name}: transformers {found} found, but its own vision-language models are known from {oldest} on; "
            "upgrade transformers, or mark the image tokens yourself: prune(model, strategy, image_tokens=…)"
        )
