"""The processor that belongs to a checkpoint, also where torchvision is not installed."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from transformers import AutoProcessor, Idefics3Processor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils.import_utils import is_torchvision_available

from tokenprune.errors import CheckpointError

VIDEO = "video_processor"


def load_processor(source: str, config: Any, revision: str | None = None) -> Any:
    """The processor of a checkpoint.

    Transformers makes the processors of models that take videos only where torchvision is installed (and num2words, for
    SmolVLM). Elsewhere their part for videos is left out, and they take images as before (ours).

    Args:
        source: folder or hub id.
        config: the model's configuration.
        revision: of a hub id.

    Raises:
        CheckpointError: the folder holds none, or one that needs a package that is not installed.
    """
    options = {} if revision is None else {"revision": revision}
    try:
        try:
            return AutoProcessor.from_pretrained(source, **options)
        except (ImportError, ValueError):
            kind = _without_videos(PROCESSOR_MAPPING.get(type(config), None))
            if kind is None or (is_torchvision_available() and find_spec("num2words")):
                raise
            return kind.from_pretrained(source, **options)
    except Exception as error:  # what transformers raises here is its own business and changes
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{source}: its processor cannot be loaded ({type(error).__name__}: {reason}); fetch the processor's "
            "files, or install what they need"
        ) from error


def _without_videos(kind: Any) -> Any:
    """A class that does what `kind` does for images and text; None where `kind` has no part for videos."""
    parts: list[str] = getattr(kind, "get_attributes", list)()
    if VIDEO not in parts:
        return None
    if kind.__name__ == "SmolVLMProcessor":  # to images it does what Idefics3's does; it needs num2words for videos
        return Idefics3Processor
    rest = [part for part in parts if part != VIDEO]
    return type(kind.__name__, (kind,), {"get_attributes": classmethod(lambda cls: rest), "__doc__": kind.__doc__})
