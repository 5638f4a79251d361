"""The processor that belongs to a checkpoint, also where torchvision is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, Idefics3Processor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils.import_utils import is_torchvision_available

from tokenprune.errors import CheckpointError

VIDEO = "video_processor"


PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


def has_processor(folder: Path) -> bool:
    """Whether a folder holds all that a processor is read from."""
    return any((folder / file).is_file() for file in PROCESSOR_FILES[:2]) and (folder / PROCESSOR_FILES[2]).is_file()


def load_processor(source: str, config: Any, revision: str | None = None) -> Any:
    """The processor of a checkpoint.

    Transformers makes the processors of models that take videos only where torchvision is installed (and num2words, for
    SmolVLM). Elsewhere their part for videos is left out, and they take images as before (ours).

    Args:
        source: folder or hub id.
        config: the model's configuration.
        revision: of a hub id.

    Raises:
        CheckpointError: the folder holds none, one that needs a package that is not installed, or one whose pictures
            the model's tower does not take.
    """
    found = _load(source, config, revision)
    for what, wanted, actual in _sizes(found, getattr(config, "vision_config", None)):
        if wanted != actual:
            raise CheckpointError(
                f"{source}: its processor makes {what} {actual}, but the model's vision tower takes {wanted}; use the "
                "preprocessor_config.json that belongs to the model"
            )
    return found


def _load(source: str, config: Any, revision: str | None) -> Any:
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


def _sizes(processor: Any, vision: Any) -> Iterator[tuple[str, Any, Any]]:
    """What processor and vision tower both say: (what, the tower's, the processor's)."""
    images: Any = processor.image_processor
    for what, name, other in (
        ("patches with a side of", "patch_size", "patch_size"),
        ("tokens of patches merged by", "spatial_merge_size", "merge_size"),
        ("frames put together by", "temporal_patch_size", "temporal_patch_size"),
    ):
        wanted = _side(getattr(vision, name, None))
        for part in (images, processor):
            actual = _side(getattr(part, other, None))
            if wanted and actual:
                yield what, wanted, actual
    size = images.crop_size if getattr(images, "do_center_crop", False) else getattr(images, "size", None)
    wanted = _side(getattr(vision, "image_size", None))
    if wanted and size and size.get("height"):
        yield "pictures with a side of", wanted, _side((size["height"], size.get("width")))


def _side(value: Any) -> Any:
    """A number of pixels or patches, where both sides have the same; else the sides."""
    if hasattr(value, "get"):
        value = (value.get("height"), value.get("width"))
    if isinstance(value, (list, tuple)):
        return value[0] if len(set(value)) == 1 else tuple(value)
    return value


def _without_videos(kind: Any) -> Any:
    """A class that does what `kind` does for images and text; None where `kind` has no part for videos."""
    parts: list[str] = getattr(kind, "get_attributes", list)()
    if VIDEO not in parts:
        return None
    if kind.__name__ == "SmolVLMProcessor":  # to images it does what Idefics3's does; it needs num2words for videos
        return Idefics3Processor
    rest = [part for part in parts if part != VIDEO]
    return type(kind.__name__, (kind,), {"get_attributes": classmethod(lambda cls: rest), "__doc__": kind.__doc__})
