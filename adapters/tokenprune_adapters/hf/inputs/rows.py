"""The rows of a batch: a prompt each, with its images and videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from PIL.Image import Image

from tokenprune.errors import InputError
from tokenprune.utils.images import to_rgb
from tokenprune_adapters.hf.inputs.videos import Video, VideoReader, is_video


@dataclass(frozen=True)
class Row:
    """A prompt, as it was given, its images and its videos."""

    prompt: Any
    images: list[Image]
    videos: list[Video] = field(default_factory=list)

    @property
    def sizes(self) -> str:
        """Of what the prompt is about, for messages."""
        images = [f"{width}×{height}" for width, height in (image.size for image in self.images)]
        return ", ".join(chain(images, (video.size for video in self.videos)))


def rows_of(image: Any, prompt: Any, video: Any, reader: VideoReader | None) -> list[Row]:
    """The rows of a batch.

    Args:
        image: one or several, or None beside a video; see `VisionLanguageModel.inputs`.
        prompt: one, or a list of them.
        video: one or several, or None.
        reader: reads the videos; None if there are none.

    Raises:
        InputError: not an image or a video, none for a prompt, or numbers of them and of prompts that do not match.
    """
    if not isinstance(prompt, (list, tuple)):
        return [_row(prompt, image, video, reader)]
    several = (isinstance(image, (list, tuple)), not is_video(video))
    lengths = [len(values) for values, are in zip((image, video), several, strict=True) if are]
    prompts = list(prompt) * lengths[0] if len(prompt) == 1 and lengths else list(prompt)
    images = _column("image", image, several[0], prompts, len(prompt))
    videos = _column("video", video, several[1], prompts, len(prompt))
    return [_row(*row, reader) for row in zip(prompts, images, videos, strict=True)]


def seen(processor: Any, rows: Sequence[Row]) -> dict[str, Any]:
    """The processor's arguments for the images and videos of these rows."""
    images: Any = [row.images for row in rows if row.images]
    videos = [video for row in rows for video in row.videos]
    if hasattr(processor, "multi_page"):  # GOT-OCR 2 takes a nested list for the pages of a document
        images = list(chain(*images))
    if not videos:
        return {"images": images}
    given = {
        "videos": [video.pixels for video in videos],
        "video_metadata": [replace(video.metadata) for video in videos],  # processors write to it
        "do_sample_frames": False,
    }
    return {"images": images, **given} if images else given


def set_rates(made: Any, processor: Any, rows: Sequence[Row]) -> None:
    """Give each video its own rate, where the processor gives all of them one from its settings (Omni)."""
    name = "video_second_per_grid"
    if name not in made:
        return
    rates = [video.rate for row in rows for video in row.videos]
    paired = processor.video_processor.temporal_patch_size
    known = [paired / rate if rate else float(default) for rate, default in zip(rates, made[name], strict=True)]
    made[name] = torch.tensor(known)


def _column(one: str, values: Any, several: bool, prompts: Sequence[Any], written: int) -> list[Any]:
    """The images or the videos of each prompt."""
    column = list(values) if several else [values] * len(prompts)
    if not prompts or len(prompts) != len(column):
        raise InputError(
            f"{len(column)} {one}s and {written} prompts found; pass a prompt for each {one}, a list of one for all, "
            f"or one {one} for all prompts (several {one}s of one prompt form a nested list)"
        )
    return column


def _row(prompt: Any, image: Any, video: Any, reader: VideoReader | None) -> Row:
    if video is None or reader is None:
        if image is None:
            raise InputError("neither an image nor a video found; pass one of them")
        return Row(prompt, _images(image))
    videos = [video] if is_video(video) else video
    if not videos:
        raise InputError("an empty list of videos found, expected one or more")
    return Row(prompt, [] if image is None else _images(image), [reader.read(one) for one in videos])


def _images(given: Any) -> list[Image]:
    images = [to_rgb(one) for one in (given if isinstance(given, (list, tuple)) else [given])]
    if not images:
        raise InputError("an empty list of images found, expected one or more")
    return images
