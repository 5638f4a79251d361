"""Folders with an adapter (LoRA) besides or instead of whole weights: the adapter's config and base model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenprune.errors import CheckpointError
from tokenprune.utils.files import expanded

ADAPTER_CONFIG = "adapter_config.json"
MERGE = "merge it with peft: PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(…)"


def adapter_config(folder: Path) -> dict[str, Any] | None:
    """The folder's adapter_config.json; None if there is none: then its weights are whole.

    Raises:
        CheckpointError: it is damaged.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); fetch the file again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a JSON {type(found).__name__}, expected an object; fetch the file again")
    return found


def base_of(folder: Path) -> str | None:
    """The base model of the adapter in a folder: a local folder (its own if it names none), else a hub id.

    None if the folder has no adapter. A relative path may start at the working directory or at the folder.

    Raises:
        CheckpointError: adapter_config.json is damaged.
    """
    config = adapter_config(folder)
    if config is None:
        return None
    name = config.get("base_model_name_or_path")
    if not name:
        return str(folder)
    places = (expanded(str(name)), folder / str(name))
    return next((str(place) for place in places if place.is_dir()), str(name))
