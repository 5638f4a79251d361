"""Loading a segmentation model for a command."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenprune.evaluation.protocol import SegmentationModel


def quiet_loading() -> None:
    """Keep transformers' own progress bars and notices off the terminal; call it before anything is loaded."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def load_model(
    source: str, *, vision_tower: Path | None = None, dtype: str | None = None, device: str | None = None
) -> SegmentationModel:
    """A model that can segment.

    Raises:
        CheckpointError: it cannot be loaded.
        InputError: it is no segmentation model.
    """
    from tokenprune import api
    from tokenprune.errors import InputError
    from tokenprune.evaluation.protocol import SegmentationModel

    options = {"vision_tower": vision_tower, "dtype": dtype, "device": device}
    model = api.load(source, **{name: value for name, value in options.items() if value is not None})
    if not isinstance(model, SegmentationModel):
        kind = type(model).__name__
        raise InputError(f"model {source!r} is a {kind}, which makes no masks; choose a segmentation model")
    return model
