"""Loading of a checkpoint's processor, also without torchvision."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, Idefics3Processor, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils.import_utils import is_torchvision_available

from tokenprune.errors import CheckpointError

VIDEO = "video_processor"


PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


def has_processor(folder: Path) -> bool:
    """Whether a folder contains all files of a processor."""
    return any((folder / file).is_file() for file in PROCESSOR_FILES[:2]) and (folder / PROCESSOR_FILES[2]).is_file()


def load_processor(source: str, config: Any, revision: str | None = None) -> Any:
    """The processor of a checkpoint.

    In transformers, processors of models with videos require torchvision (and num2words, for SmolVLM). Without these
    packages the video processor is omitted, and images work as before (ours).

    Args:
        source: folder or hub id.
        config: the model's configuration.
        revision: revision of a hub id.

    Raises:
        CheckpointError: the folder contains no processor, or one that requires a package that is not installed, or that
            does not match the model's vision tower.
    """
    found = _load(source, config, revision)
    shuffled = getattr(config, "downsample_factor", 1)  # Aya Vision's processor multiplies its patch size by it
    for what, wanted, actual in _sizes(found, getattr(config, "vision_config", None), shuffled):
        if wanted != actual:
            raise CheckpointError(
                f"{source}: its processor makes {what} {actual}, but the model's vision tower expects {wanted}; use "
                "the preprocessor_config.json that belongs to the model"
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
    except Exception as error:  # the exceptions of transformers differ between releases
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{source}: its processor cannot be loaded ({type(error).__name__}: {reason}); fetch the processor's "
            "files, or install the packages that it requires"
        ) from error


def _sizes(processor: Any, vision: Any, shuffled: int) -> Iterator[tuple[str, Any, Any]]:
    """Sizes in the configurations of both vision tower and processor: (name, the tower's, the processor's)."""
    images: Any = processor.image_processor
    for what, name, other in (
        ("patches with a side of", "patch_size", "patch_size"),
        ("tokens of patches merged by", "spatial_merge_size", "merge_size"),
        ("frames put together by", "temporal_patch_size", "temporal_patch_size"),
    ):
        wanted = _side(getattr(vision, name, None))
        for part in (images, processor):
            actual = _side(getattr(part, other, None))
            if wanted and actual and (part is images or actual != shuffled * wanted):
                yield what, wanted, actual
    size = images.crop_size if getattr(images, "do_center_crop", False) else getattr(images, "size", None)
    wanted = _side(getattr(vision, "image_size", None))
    if wanted and size and size.get("height"):
        yield "pictures with a side of", wanted, _side((size["height"], size.get("width")))


def _side(value: Any) -> Any:
    """The side in pixels or patches if both are equal; else both sides."""
    if hasattr(value, "get"):
        value = (value.get("height"), value.get("width"))
    if isinstance(value, (list, tuple)):
        return value[0] if len(set(value)) == 1 else tuple(value)
    return value


def _without_videos(kind: Any) -> Any:
    """A processor class like `kind` without its video processor; None if `kind` has none."""
    parts: list[str] = getattr(kind, "get_attributes", list)()
    if VIDEO not in parts:
        return None
    if kind.__name__ == "SmolVLMProcessor":  # equal to Idefics3's for images; requires num2words for videos
        return Idefics3Processor
    rest, place = [part for part in parts if part != VIDEO], parts.index(VIDEO)
    own = {"get_attributes": classmethod(lambda cls: rest), "video_place": place, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind, _WithoutVideos), own)


class _WithoutVideos(ProcessorMixin):
    """Stands between a processor class and its base, which tell the parts by their order, where videos have a place."""

    video_place: int

    def __init__(self, *parts: Any, **options: Any) -> None:
        given = (part for part in parts if part is not None)
        super().__init__(*given, **options)  # type: ignore[no-untyped-call]

    @classmethod
    def from_args_and_dict(cls, args: list[Any], processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """See `ProcessorMixin.from_args_and_dict`; the video processor is None."""
        whole = [*args[: cls.video_place], None, *args[cls.video_place :]]
        return super().from_args_and_dict(whole, processor_dict, **kwargs)
