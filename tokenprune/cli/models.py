"""Loading the model of a command."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenprune.evaluation.models import AnsweringModel, SegmentationModel


def quiet_loading() -> None:
    """Keep transformers' own progress bars and notices off the terminal; call it before anything is loaded."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def load_model(
    source: str, *, vision_tower: Path | None = None, dtype: str | None = None, device: str | None = None
) -> SegmentationModel:
    """Load a segmentation model.

    Raises:
        CheckpointError: it cannot be loaded.
        InputError: it is not a segmentation model.
    """
    from tokenprune.errors import InputError
    from tokenprune.evaluation.models import SegmentationModel

    model = _loaded(source, vision_tower=vision_tower, dtype=dtype, device=device)
    if not isinstance(model, SegmentationModel):
        kind = type(model).__name__
        raise InputError(
            f"model {source!r} is a {kind}, which makes no masks; choose a segmentation model, or for answers in words "
            "use `tokenprune answer`, `tokenprune recommend` or lmms-eval"
        )
    return model


def load_answering_model(source: str, *, dtype: str | None = None, device: str | None = None) -> AnsweringModel:
    """Load a model that answers in words.

    Raises:
        CheckpointError: it cannot be loaded.
        InputError: it makes masks instead, or has no method `answer`.
    """
    from tokenprune.errors import InputError
    from tokenprune.evaluation.models import AnsweringModel, SegmentationModel

    model = _loaded(source, dtype=dtype, device=device)
    kind = type(model).__name__
    if isinstance(model, SegmentationModel):  # its `answer`, if any, is a step of `segment`
        raise InputError(f"model {source!r} is a {kind}, which makes masks; use `tokenprune segment`")
    if not isinstance(model, AnsweringModel):
        raise InputError(f"model {source!r} is a {kind}, which has no answer(image, prompt); choose another model")
    return model


def load_any_model(
    source: str, *, vision_tower: Path | None = None, dtype: str | None = None, device: str | None = None
) -> SegmentationModel | AnsweringModel:
    """Load a model that makes masks or answers in words.

    Raises:
        CheckpointError: it cannot be loaded.
        InputError: it does neither.
    """
    from tokenprune.errors import InputError
    from tokenprune.evaluation.models import AnsweringModel, SegmentationModel

    model = _loaded(source, vision_tower=vision_tower, dtype=dtype, device=device)
    if not isinstance(model, (SegmentationModel, AnsweringModel)):
        kind = type(model).__name__
        raise InputError(f"model {source!r} is a {kind}, which makes no masks and has no answer(image, prompt)")
    return model


def _loaded(source: str, **options: object) -> Any:
    from tokenprune import api

    return api.load(source, **{name: value for name, value in options.items() if value is not None})
