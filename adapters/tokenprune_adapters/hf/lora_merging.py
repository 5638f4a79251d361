"""Merging of adapters (LoRA or any other that peft can merge) into models of transformers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from tokenprune.errors import CheckpointError, UnsupportedError
from tokenprune.loading.lora_folders import ADAPTER_CONFIG, MERGE, base_of
from tokenprune.utils.files import expanded


def base_source(source: str) -> str | None:
    """The base model of the adapter in a folder; None if the folder contains no adapter.

    Raises:
        CheckpointError: adapter_config.json is damaged, or does not name another folder.
        UnsupportedError: peft is not installed.
    """
    folder = expanded(source)
    base = base_of(folder)
    if base is None:
        return None
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            f"{source} contains an unmerged adapter ({ADAPTER_CONFIG}), and merging it into {base} requires the "
            "package peft; install it, or merge the adapter elsewhere and load the result"
        ) from error
    if Path(base) == folder or Path(base).resolve() == folder.resolve():
        raise CheckpointError(
            f"{source} contains an adapter but names no other base model; move the adapter to a separate folder, and "
            f"set base_model_name_or_path in its {ADAPTER_CONFIG} to the base's folder or hub id"
        )
    return base


def merged(model: Any, source: str) -> Any:
    """The model with the adapter of a folder merged into its weights.

    Raises:
        CheckpointError: the adapter is damaged, belongs to another model, or cannot be merged.
    """
    import peft

    try:
        config = peft.PeftConfig.from_pretrained(source)
        config.inference_mode = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # keys that do not match are reported below
            wrapped = peft.get_peft_model(model, config)
            report = wrapped.load_adapter(source, "default")
        left = [*report.missing_keys, *report.unexpected_keys]
        if left:
            raise CheckpointError(
                f"the adapter in {source} is for another model: {len(left)} tensors do not match, such as {left[0]}; "
                f"correct base_model_name_or_path in its {ADAPTER_CONFIG}"
            )
        return wrapped.merge_and_unload()
    except CheckpointError:
        raise
    except Exception as error:  # the exceptions of peft differ between releases
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"the adapter in {source} cannot be merged ({type(error).__name__}: {reason}); correct it, or {MERGE}"
        ) from error
