"""What a tiny processor is made of: the row of a type, and what several types share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vlm_configs import CROP, END, FAKE, IMAGE, PATCH, START, VIDEO

AUDIO = 120


@dataclass(frozen=True)
class TinyProcessor:
    """The processor of a type.

    Attributes:
        hub: a released checkpoint, which pages name; None if none is known.
        tokens: special tokens, with the ids of the tiny configuration; the first stands for an image in a prompt.
        kind: class of the processor, without "Processor".
        images: class of the image processor, without "ImageProcessor", and its options.
        videos: class of the video processor; None if there is none.
        options: further entries of processor_config.json.
        named: tokens that the tokenizer has as attributes, by name.
        marks: what the chat template writes for an image, if it is more than the token that stands for it.
        begins: whether a prompt begins with the tokenizer's token for it.
        begun: whether the chat template writes that token.
        prepends: whether the processor writes that token, and the tokenizer does not.
        byte_level: whether transformers takes a tokenizer of its own for the type, which reads bytes as GPT-2's.
        tokenizer: further entries of tokenizer_config.json.
        templated: whether the checkpoint has a chat template.
        config: makes the configuration; None = the family's.
        feature_extractor: class of the part for sound; None if there is none.
        torchvision: whether the image processor needs it.
    """

    hub: str | None
    tokens: dict[str, int]
    kind: str
    images: tuple[str, dict[str, Any]]
    videos: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    named: dict[str, Any] = field(default_factory=dict)
    marks: str | None = None
    begins: bool = False
    begun: bool = False
    prepends: bool = False
    byte_level: bool = False
    tokenizer: dict[str, Any] = field(default_factory=dict)
    templated: bool = True
    config: Callable[[], Any] | None = None
    feature_extractor: str | None = None
    torchvision: bool = False

    def preprocessor(self) -> dict[str, Any]:
        """What preprocessor_config.json contains: the parts for images and for sound."""
        kind, options = self.images
        sound = {"feature_extractor_type": self.feature_extractor} if self.feature_extractor else {}
        return {"image_processor_type": f"{kind}ImageProcessor", **options, **sound}


QWEN = {"<|image_pad|>": IMAGE, "<|video_pad|>": VIDEO, "<|vision_start|>": START, "<|vision_end|>": END}
GLM = {
    "<|image|>": IMAGE,
    "<|video|>": VIDEO,
    "<|begin_of_image|>": START,
    "<|end_of_image|>": END,
    "<|begin_of_video|>": FAKE,
    "<|end_of_video|>": 105,
}
PACKED = {
    "patch_size": PATCH,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 64, "longest_edge": 4096},
}
TILES = {"size": {"height": CROP, "width": CROP}, "crop_to_patches": True, "min_patches": 1, "max_patches": 4}


def square(side: int, **more: Any) -> dict[str, Any]:
    return {"size": {"height": side, "width": side}, **more}
