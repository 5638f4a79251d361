"""Frames of videos: decoded from files, or given as pictures, and sampled."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from transformers.video_utils import VideoMetadata, load_video

from tokenprune.errors import InputError, OptionError
from tokenprune.utils.arguments import shown, whole_number
from tokenprune.utils.extras import check_modules
from tokenprune.utils.files import IMAGE_SUFFIXES, absent, path_given, reason
from tokenprune.utils.images import to_rgb

VideoInput = Any  # a path, a list of frames, an array or a tensor; spelled out in `VideoReader.read`
MOST = 768
"""Frames of a file that are taken if its processor does not sample and no number is requested (ours)."""


@dataclass(frozen=True)
class Video:
    """The sampled frames of a video.

    Attributes:
        pixels: uint8 [frames, height, width, 3].
        metadata: of the whole video, and which of its frames these are.
    """

    pixels: np.ndarray[Any, Any]
    metadata: VideoMetadata

    @property
    def rate(self) -> float | None:
        """Frames per second of the sampled frames; None if unknown."""
        whole = self.metadata
        return float(len(self.pixels) / whole.total_num_frames * whole.fps) if whole.fps else None

    @property
    def size(self) -> str:
        """For messages."""
        frames, height, width, _ = self.pixels.shape
        return f"{frames} frames of {width}×{height}"


def is_video(value: Any) -> bool:
    """Whether a value is one video, rather than a list of several: a list is one if all its items are pictures."""
    if not isinstance(value, (list, tuple)):
        return True
    return bool(value) and all(isinstance(one, Image) or getattr(one, "ndim", 0) in (2, 3) for one in value)


class VideoReader:
    """Reads videos and samples their frames.

    Args:
        processor: the video processor, whose way of sampling files applies unless `frames` or `fps` is given.
        frames: number of frames taken at even distances.
        fps: frames per second that the model sees: files are sampled at this rate, and frames that are given have it.

    Raises:
        OptionError: `frames` is not a whole number of at least 1, `fps` is not a number above 0, or both are given.
    """

    def __init__(self, processor: Any, frames: int | None = None, fps: float | None = None) -> None:
        if frames is not None and fps is not None:
            raise OptionError(f"both frames={shown(frames)} and fps={shown(fps)} found; pass one of them")
        if fps is not None and (not isinstance(fps, Real) or isinstance(fps, bool) or not 0 < fps < inf):
            raise OptionError(f"fps: {shown(fps)} found, expected a number above 0")
        self._processor, self._fps = processor, fps
        self._frames = None if frames is None else whole_number("frames", frames, 1)
        self._known: dict[int, tuple[VideoInput, Video]] = {}  # a video may be given for every prompt of a batch

    def read(self, video: VideoInput) -> Video:
        """The frames that the model sees.

        Args:
            video: path of a video file, or of a folder of frames in the order of their names (numbers in them count
                as numbers); a list of frames, each as for `to_rgb`; an array or tensor [frames, height, width, 3].

        Raises:
            InputError: no such file, one that cannot be decoded, no frames, frames of several sizes, or fewer frames
                than requested.
            UnsupportedError: a file, and OpenCV is not installed.
        """
        if id(video) not in self._known:
            self._known[id(video)] = video, self._read(video)
        return self._known[id(video)][1]

    def _read(self, video: VideoInput) -> Video:
        if isinstance(video, (str, Path)):
            path = path_given("video", video)
            try:
                frames = _frames_in(path) if path.is_dir() else None
                there = path.is_file()
            except OSError as error:
                shortened = str(path)[:200]
                raise InputError(f"video {shortened!r} cannot be read ({reason(error)}); choose another") from error
            if frames is not None:
                return self._of_frames(frames, f"folder {str(path)!r}")
            if not there:
                raise InputError(f"video {absent(video)}")
            return self._of_file(path)
        if isinstance(video, (list, tuple)):
            return self._of_frames(video, "a list of frames")
        if isinstance(video, (np.ndarray, torch.Tensor)) and video.ndim == 4:
            return self._of_frames(video, "an array of frames")
        found = f"of shape {list(video.shape)}" if hasattr(video, "shape") else shown(video)
        raise InputError(
            f"video {found} found, expected a path, a list of pictures, or an array or tensor [frames, height, width, "
            "3]; several videos form a list"
        )

    def _of_frames(self, frames: Sequence[Any] | Any, name: str) -> Video:
        total = len(frames)
        if not total:
            raise InputError(f"{name} has no frames, expected one or more")
        indices = np.arange(total) if self._frames is None else _evenly(self._frames, total, name)
        pictures = [to_rgb(frames[int(index)]) for index in indices]
        sizes = sorted({picture.size for picture in pictures})
        if len(sizes) > 1:
            (width, height), (other, tall) = sizes[:2]
            raise InputError(
                f"{name} has frames of {width}×{height} and {other}×{tall} pixels, expected one size; resize them"
            )
        rate = self._fps or getattr(self._processor, "fps", None)  # at which the processor samples files (ours)
        width, height = sizes[0]
        metadata = VideoMetadata(
            total_num_frames=total,
            fps=rate,
            width=width,
            height=height,
            duration=total / rate if rate else None,
            frames_indices=indices.tolist(),
        )
        return Video(np.stack([np.asarray(picture) for picture in pictures]), metadata)

    def _of_file(self, path: Path) -> Video:
        name = f"video {str(path)!r}"
        if path.suffix.lower() in IMAGE_SUFFIXES - {".gif", ".webp"}:
            raise InputError(
                f"{name} is a picture; pass it as image=, or pass the folder of a video's frames (paths in a list are "
                "several videos: frames by their paths are a list in the list)"
            )
        check_modules("the list of a video file's frames", ["cv2"], "video")
        source: Any = str(path)  # transformers annotates paths with a type of its own
        chosen: list[int] = []

        def sample(metadata: VideoMetadata, **_: Any) -> np.ndarray[Any, Any]:
            if metadata.total_num_frames < 1:
                raise InputError(f"{name} cannot be decoded by OpenCV; convert it to MP4, or pass its frames")
            chosen.extend(int(index) for index in self._indices(metadata, name))
            return np.unique(chosen)  # OpenCV decodes a frame once, also where it is chosen twice

        try:
            pixels, metadata = load_video(source, backend="opencv", sample_indices_fn=sample)
        except InputError:
            raise
        except Exception as error:  # of OpenCV, or of a processor's way of sampling
            problem = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise InputError(f"{name} cannot be read ({problem}); convert it to MP4, or pass its frames") from error
        order = np.unique(chosen, return_inverse=True)[1]
        if len(pixels) <= order.max():
            raise InputError(
                f"{name}: {len(pixels)} of the {order.max() + 1} chosen frames can be decoded; encode it anew, or pass "
                "its frames"
            )
        metadata.frames_indices = chosen
        return Video(np.asarray(pixels)[order], metadata)

    def _indices(self, metadata: VideoMetadata, name: str) -> Sequence[Any] | Any:
        """Which frames of a file are taken."""
        total, rate = metadata.total_num_frames, metadata.fps
        if self._frames is not None:
            return _evenly(self._frames, total, name)
        if self._fps is not None:
            if not rate or self._fps > rate:
                raise InputError(
                    f"{name} has {rate or 'an unknown number of'} frames per second, fps={self._fps} requested; "
                    "request fewer, or pass frames="
                )
            return _evenly(max(1, round(total / rate * self._fps)), total, name)
        if self._processor.do_sample_frames:
            return self._own_sampling()(metadata=metadata)
        if total > MOST:
            raise InputError(
                f"{name} has {total} frames, and {type(self._processor).__name__} takes them all; pass frames= or fps="
            )
        return range(total)

    def _own_sampling(self) -> Callable[..., Any]:
        """The processor's sampling, with its settings."""
        processor = self._processor
        names = {*processor.valid_kwargs.__annotations__} - {"video_metadata"}
        settings = {name: getattr(processor, name, None) for name in names}
        return lambda metadata: processor.sample_frames(metadata=metadata, **settings)


def _evenly(count: int, total: int, name: str) -> np.ndarray[Any, Any]:
    if count > total:
        raise InputError(f"{name} has {total} frames, frames={count} requested; request fewer")
    return np.arange(count) * total // count


def _frames_in(folder: Path) -> list[Path]:
    found = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
    return sorted(found, key=lambda path: _numbered(path.name))


def _numbered(name: str) -> list[str | int]:
    """Text and numbers of a name in turn, beginning with text: 2 comes before 10."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"(\d+)", name))]
