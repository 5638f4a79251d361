"""An unmerged adapter (LoRA or any other that peft merges) of one of transformers' models."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from tokenprune.errors import CheckpointError, UnsupportedError
from tokenprune.loading.lora_folders import ADAPTER_CONFIG, MERGE, base_of
from tokenprune.utils.files import expanded


def base_source(source: str) -> str | None:
    """What to load before the adapter in a folder; None where the folder holds no adapter.

    Raises:
        CheckpointError: adapter_config.json is damaged, or names the folder itself or nothing.
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
            f"{source} holds an unmerged adapter ({ADAPTER_CONFIG}), and merging it into {base} needs the package "
            "peft; install it, or merge the adapter elsewhere and load the result"
        ) from error
    if Path(base) == folder or Path(base).resolve() == folder.resolve():
        raise CheckpointError(
            f"{source} holds an adapter and names no base model besides itself; put the adapter into a folder of its "
            f"own, and the base's folder or name into base_model_name_or_path in its {ADAPTER_CONFIG}"
        )
    return base


def merged(model: Any, source: str) -> Any:
    """The model with the adapter of a folder merged into its weights.

    Raises:
        CheckpointError: the adapter is damaged, of another model, or cannot be merged.
    """
    import peft

    try:
        config = peft.PeftConfig.from_pretrained(source)
        config.inference_mode = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what does not fit is reported below
            wrapped = peft.get_peft_model(model, config)
            report = wrapped.load_adapter(source, "default")
        left = [*report.missing_keys, *report.unexpected_keys]
        if left:
            raise CheckpointError(
                f"the adapter in {source} is of another model: {len(left)} tensors do not fit, such as {left[0]}; "
                f"correct base_model_name_or_path in its {ADAPTER_CONFIG}"
            )
        return wrapped.merge_and_unload()
    except CheckpointError:
        raise
    except Exception as error:  # what peft raises on a bad adapter is its own business and changes
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"the adapter in {source} cannot be merged ({type(error).__name__}: {reason}); correct it, or {MERGE}"
        ) from error
