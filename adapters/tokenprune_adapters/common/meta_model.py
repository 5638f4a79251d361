"""A model of transformers without weights, of the sizes that a checkpoint's config.json gives."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from tokenprune.errors import CheckpointError

ModelT = TypeVar("ModelT", bound=PreTrainedModel)


def meta_model(
    kind: type[ModelT],
    values: Mapping[str, Any],
    folder: Path,
    what: str,
    attn_implementation: str | None = None,
    advice: str = "",
) -> ModelT:
    """A model on the meta device.

    Args:
        kind: its class.
        values: arguments of its configuration.
        folder: of the checkpoint, for messages.
        what: the model's name in messages.
        attn_implementation: as in transformers; None = its default.
        advice: how to mend config.json, for messages.

    Raises:
        CheckpointError: the values describe no such model.
    """
    extra = {"attn_implementation": attn_implementation} if attn_implementation else {}
    configuration: Any = kind.config_class
    try:
        with torch.device("meta"):
            model: ModelT = kind._from_config(configuration(**values), **extra)  # type: ignore[no-untyped-call]
    except Exception as error:  # the exceptions of config classes differ between releases
        reason = " ".join(str(error).split())
        cure = f"; {advice}" if advice else ""
        raise CheckpointError(f"{folder}/config.json describes no {what}: {reason}{cure}") from error
    return model
