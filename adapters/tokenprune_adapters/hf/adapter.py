"""The adapter for vision-language models of transformers: recognises, loads and binds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText

from tokenprune.errors import CheckpointError, UnsupportedError
from tokenprune.loading.adapter import Adapter
from tokenprune.loading.lora_folders import MERGE
from tokenprune.loading.model_support import ModelSupport
from tokenprune.utils.files import expanded
from tokenprune_adapters.common.checkpoint import INDEX_FILES, SINGLE_FILES
from tokenprune_adapters.common.load_options import (
    check_one_placement,
    check_strings,
    refuse_unknown,
    shown_name,
    torch_device,
    torch_dtype,
)
from tokenprune_adapters.common.shards import has_shards
from tokenprune_adapters.hf import lora_merging as merging
from tokenprune_adapters.hf.bound_model import BoundTransformersModel
from tokenprune_adapters.hf.families import FAMILIES, WITH_TALKER, family_of
from tokenprune_adapters.hf.model import VisionLanguageModel
from tokenprune_adapters.hf.model_support import model_support
from tokenprune_adapters.hf.processor import has_processor

OPTIONS = ("dtype", "device", "device_map", "attn_implementation", "revision", "quantization_config")
OLDEST = (5, 0)
"""The oldest supported release of transformers; in earlier ones the models are structured differently."""


class TransformersAdapter(Adapter):
    """LLaVA, Qwen-VL, InternVL, SmolVLM, PaliGemma, Gemma 3 and related models, as implemented in transformers."""

    model_types = tuple(FAMILIES)
    merges_lora = True

    @classmethod
    def matches(cls, source: str, config: Mapping[str, Any]) -> bool:
        """Whether config.json belongs to a known family and was saved by transformers."""
        kind, names = config.get("model_type"), config.get("architectures") or ()
        if kind in WITH_TALKER:
            return True
        return kind in FAMILIES and any(
            str(name).endswith("ForConditionalGeneration") or name == FAMILIES[kind].loaded_by for name in names
        )

    @classmethod
    def model_support(cls, model_type: str | None = None) -> list[ModelSupport]:
        """Every type in the mapping of image-text-to-text models of the installed transformers."""
        return model_support(model_type)

    @classmethod
    def bind(cls, model: Any) -> BoundTransformersModel | None:
        """Bind a live model of a known family, with or without its language-modelling head.

        Raises:
            UnsupportedError: transformers is older than `OLDEST`, or the model lacks a part that its family has.
        """
        base: Any = getattr(model, "base_model", None)
        kind = getattr(getattr(base, "config", None), "model_type", None)
        if kind not in FAMILIES or not hasattr(base, "get_image_features"):
            return None
        _refuse_old_releases(type(model).__name__)
        family = family_of(base.config)
        return BoundTransformersModel(base if type(model).__name__ == family.loaded_by else model, family)

    @classmethod
    def load(cls, source: str, **options: Any) -> VisionLanguageModel:
        """Load a checkpoint with transformers.

        Args:
            source: folder or hub id.
            options: `dtype` (by default the stored one; float32 on a CPU), `device`, `device_map`,
                `attn_implementation`, `revision`, `quantization_config`: as in transformers.

        If the folder contains adapter_config.json, peft merges its adapter into the base; peft must be installed.

        Raises:
            CheckpointError: weights are missing, damaged or mis-shaped, or an adapter does not match its base.
            OptionError: an unknown option, or both device= and device_map=.
            UnsupportedError: transformers is older than `OLDEST`, or a package is not installed.
        """
        _refuse_old_releases(source)
        refuse_unknown(options, OPTIONS, "transformers")
        check_strings(**{name: options.get(name) for name in ("device_map", "attn_implementation", "revision")})
        device, device_map = options.pop("device", None), options.get("device_map")
        check_one_placement(device, device_map)
        place = torch_device(device)
        quantised = options.get("quantization_config") is not None
        if quantised and device is not None:  # such models cannot be moved later
            options["device_map"] = device_map = {"": str(place)}
        default = torch.float32 if place.type == "cpu" and device_map is None and not quantised else "auto"
        dtype = torch_dtype(options.pop("dtype", None)) or default
        base = merging.base_source(source)
        model = _read(base or source, dtype=dtype, **options)
        if base is not None:
            model = merging.merged(model, source)
        if device_map is None and not getattr(model, "is_quantized", False):  # quantised models are placed already
            model.to(place)
        processor = base if base is not None and not has_processor(expanded(source)) else source
        return VisionLanguageModel(model.eval(), processor, shown_name(source), options.get("revision"))


def _read(source: str, **options: Any) -> Any:
    """Load the model of a folder or hub id; all of its weights must be present."""
    folder = expanded(source)
    if (
        folder.is_dir()
        and has_shards(folder)
        and not any((folder / file).is_file() for file in INDEX_FILES + SINGLE_FILES)
    ):
        raise CheckpointError(
            f"{source} has shards without an index, which transformers requires; fetch {' or '.join(INDEX_FILES)} too"
        )
    try:
        revision = {"revision": options["revision"]} if options.get("revision") else {}
        config = AutoConfig.from_pretrained(source, **revision)
        config = getattr(config, "thinker_config", config)
        family = FAMILIES.get(config.model_type)
        wrapper = family and family.loaded_by
        kind: Any = getattr(transformers, wrapper) if wrapper else AutoModelForImageTextToText
        loaded: Any = kind.from_pretrained(source, config=config, output_loading_info=True, **options)
    except ImportError as error:
        reason = " ".join(str(error).split())[:300]
        raise UnsupportedError(f"{source} needs a package that is not installed, install it ({reason})") from error
    except Exception as error:  # the exceptions of transformers differ between releases
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{source} cannot be loaded ({type(error).__name__}: {reason})") from error
    model, report = loaded
    factors = sorted(str(name) for name in report["unexpected_keys"] if ".lora_" in str(name))
    if factors:
        raise CheckpointError(
            f"{source} contains unmerged LoRA tensors among its weights ({len(factors)}, such as {factors[0]}); {MERGE}"
        )
    missing = sorted(str(name) for name in report["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{source}: {len(missing)} tensors are missing ({', '.join(missing[:3])}, …); fetch all of its weight files"
        )
    return model.model if wrapper else model


def _refuse_old_releases(name: str) -> None:
    found, oldest = transformers.__version__, ".".join(map(str, OLDEST))
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        raise UnsupportedError(
            f"{name}: transformers {found} found, but its vision-language models are supported from {oldest} on; "
            "upgrade transformers, or mark the image tokens yourself: prune(model, strategy, image_tokens=…)"
        )
