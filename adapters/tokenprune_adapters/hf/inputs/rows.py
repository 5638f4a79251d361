"""The rows of a batch: a prompt each, with its images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from PIL.Image import Image

from tokenprune.errors import InputError
from tokenprune.utils.images import to_rgb


@dataclass(frozen=True)
class Row:
    """A prompt, as it was given, and its images."""

    prompt: Any
    images: list[Image]


def rows_of(image: Any, prompt: Any) -> list[Row]:
    """The rows of a batch.

    Args:
        image: one or several; see `VisionLanguageModel.inputs`.
        prompt: one, or a list of them.

    Raises:
        InputError: not an image, none for a prompt, or numbers of images and prompts that do not match.
    """
    return [Row(text, _images(given)) for given, text in _pairs(image, prompt)]


def sizes(images: Iterable[Image]) -> str:
    """Sizes in pixels, for messages."""
    return ", ".join(f"{width}×{height}" for width, height in (one.size for one in images))


def _images(given: Any) -> list[Image]:
    images = [to_rgb(one) for one in (given if isinstance(given, (list, tuple)) else [given])]
    if not images:
        raise InputError("an empty list of images found, expected one or more")
    return images


def _pairs(image: Any, prompt: Any) -> list[tuple[Any, Any]]:
    """The image or images and the prompt of each row."""
    if not isinstance(prompt, (list, tuple)):
        return [(image, prompt)]
    images = list(image) if isinstance(image, (list, tuple)) else [image] * len(prompt)
    prompts = list(prompt) * len(images) if len(prompt) == 1 else list(prompt)
    if not prompts or len(prompts) != len(images):
        raise InputError(
            f"{len(images)} images and {len(prompt)} prompts found; pass a prompt for each image, a list of one for "
            "all, or one image for all prompts (several images of one prompt form a nested list)"
        )
    return list(zip(images, prompts, strict=True))
