"""Loading of a checkpoint's processor, also without torchvision."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoProcessor, Gemma3Processor, Idefics3Processor, ProcessorMixin, ShieldGemma2Processor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils.hub import cached_file
from transformers.utils.import_utils import is_torchvision_available

from tokenprune.errors import CheckpointError, InputError
from tokenprune_adapters.hf.families import FAMILIES, ROWS_DIFFER

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


def asked_of(processor: Any) -> dict[str, Any]:
    """What a processor names among its model's inputs, and some (Cosmos 3 Edge's) give only if it is asked for."""
    types = "mm_token_type_ids"
    return {f"return_{types}": True} if types in getattr(processor, "model_input_names", ()) else {}


def on_device(made: Any, model: Any) -> Any:
    """Inputs on the model's device; pixels that a processor gives in half precision (Llama 4's) in the model's."""
    made = made.to(model.device)
    for name, value in made.items():
        if torch.is_tensor(value) and value.is_floating_point() and value.dtype != torch.float32:
            made[name] = value.to(model.dtype)
    return made


def check_image_tokens(
    made: Any, visual: Tensor, config: Any, processor: Any, sizes: Sequence[str], placeholder: str
) -> None:
    """Refuse images and videos of which no tokens were made.

    Args:
        made: the model's inputs.
        visual: bool [batch, sequence], where the tokens of images and videos are.
        config: the model's configuration.
        processor: the processor that made them.
        sizes: sizes of each prompt's images, for messages.
        placeholder: what stands for an image in a prompt.

    Raises:
        InputError: the processor does not know the placeholder, or an image is too small for a token.
    """
    kind = type(processor).__name__
    bare = (~visual.any(1)).nonzero().flatten().tolist()
    if bare:
        raise InputError(
            f"prompt {bare[0]} has no image tokens: {kind} does not know {placeholder}, or images of {sizes[bare[0]]} "
            "pixels are too small for it; leave it out, or enlarge them"
        )
    merged, shapes = getattr(config, "spatial_merge_size", None), made.get("image_sizes")
    if merged and shapes is not None:  # LightOnOCR, whose images may have any size
        side = merged * config.vision_config.patch_size
        if int(torch.as_tensor(shapes).min()) < side:
            raise InputError(
                f"{kind} made images of {', '.join(sizes)} pixels into ones with a side of less than {side}, which "
                "have no image tokens; enlarge them"
            )


def check_images(made: Any, config: Any, sizes: Sequence[str]) -> None:
    """Refuse images that transformers' model of a type fails with, or sees otherwise in a batch than alone.

    Arguments as of `check_image_tokens`.

    Raises:
        InputError: a single image token for Mistral 3; images of several sizes in a batch for Emu3; a batch for
            HunYuan-VL.
    """
    family = FAMILIES.get(config.model_type)
    if len(sizes) > 1 and family is not None and ROWS_DIFFER in family.limits:
        raise InputError(
            f"{len(sizes)} prompts in one batch found: transformers numbers the images of all together, so that "
            "an answer depends on the other prompts; pass one prompt at a time"
        )
    if config.model_type == "mistral3" and int((made["input_ids"] == config.image_token_id).sum()) == 1:
        raise InputError(
            f"an image of {sizes[0]} pixels is one image token, with which transformers' Mistral 3 fails; enlarge it"
        )
    if config.model_type == "emu3" and len(sizes) > 1 and len({*map(tuple, made["image_sizes"].tolist())}) > 1:
        raise InputError(
            f"images of {', '.join(sizes)} pixels in one batch are padded to one size, by which Emu3 gets other words "
            "for the smaller ones; pass one prompt at a time, or images of one size"
        )


def _load(source: str, config: Any, revision: str | None) -> Any:
    options = {} if revision is None else {"revision": revision}
    of_type: Any = PROCESSOR_MAPPING.get(type(config), None)
    # ShieldGemma 2's own processor takes no prompts: it writes one for each of its policies
    auto: Any = Gemma3Processor if of_type is ShieldGemma2Processor else AutoProcessor
    try:
        try:
            found = auto.from_pretrained(source, **options)
        except (ImportError, ValueError, RecursionError) as error:  # the last: LLaVA-NeXT-Video without its video file
            kind = _without_videos(_named_class(source, options) or of_type)
            if kind is None or (is_torchvision_available() and find_spec("num2words")):
                raise
            try:
                found = kind.from_pretrained(source, **options)
            except AttributeError:  # MiniCPM's reads the part for videos, whose package the first error names
                raise error from None
            found.without_videos = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        if not hasattr(found, "image_processor"):  # AutoProcessor gives a tokenizer where no file names a class
            raise ValueError(f"no file names the class of a processor, found {type(found).__name__}")
        return found
    except Exception as error:  # the exceptions of transformers differ between releases
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{source}: its processor cannot be loaded ({type(error).__name__}: {reason}); fetch the processor's "
            "files, or install the packages that it requires"
        ) from error


def _named_class(source: str, options: dict[str, str]) -> Any:
    """The processor's class by the checkpoint's files; None if they name none."""
    for file in PROCESSOR_FILES:
        path = cached_file(source, file, _raise_exceptions_for_missing_entries=False, **options)
        name = path and json.loads(Path(path).read_text(encoding="utf-8")).get("processor_class")
        if name:
            return getattr(transformers, name, None)
    return None


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
            # Step 3.7's calls the side of a crop `patch_size`
            actual = _side(getattr(part, f"vision_{other}", getattr(part, other, None)))
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
    place, rest = parts.index(VIDEO), [part for part in parts if part != VIDEO]

    class ImagesAlone(ProcessorMixin):
        """Between `kind` and its base: `kind` gets None as its video processor, and its base gets none."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop(VIDEO, None)
            super().__init__(*args[:place], *args[place + 1 :], **kwargs)  # type: ignore[no-untyped-call]

        @classmethod
        def get_attributes(cls) -> list[str]:
            return rest

        @classmethod
        def _get_arguments_from_pretrained(cls, *args: Any, **kwargs: Any) -> list[Any]:
            found = super()._get_arguments_from_pretrained(*args, **kwargs)  # type: ignore[no-untyped-call]
            return [*found[:place], None, *found[place:]]

    return type(kind.__name__, (kind, ImagesAlone), {"__doc__": kind.__doc__})
