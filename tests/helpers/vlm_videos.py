"""Tiny checkpoints whose processors take videos too, and videos for them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BatchFeature
from transformers.processing_utils import VideosKwargs
from transformers.utils.import_utils import is_torchvision_available
from transformers.video_utils import make_batched_metadata
from vlm_checkpoints import TOKENS, VIDEO_PROCESSORS, chat_template, marks, placeholder, write_vlm
from vlm_configs import CROP, PATCH, SMALL_CROP
from vlm_processors import PACKED

import tokenprune as tp
from tokenprune_adapters.hf import FAMILIES

NAMES = [name for name in TOKENS if FAMILIES[name].videos]
"""Families with videos whose checkpoints are loaded."""
GLM = [name for name in NAMES if FAMILIES[name].one_token]
STOOD_IN = ("qwen2_5_vl", "llava_onevision")
"""Families for which `PlainVideos` stands in where torchvision, which transformers' own video processors need, is
not installed."""


class PlainVideos:
    """A video processor that resizes nothing and samples two frames per second.

    Args:
        packed: whether patches are packed into one sequence, as for Qwen2.5-VL; else frames are cropped to one size, as
            for LLaVA-OneVision.
    """

    valid_kwargs = VideosKwargs
    model_input_names = ("pixel_values_videos",)
    merge_size, temporal_patch_size, fps, num_frames, do_sample_frames = 2, 2, 2, None, True

    def __init__(self, packed: bool) -> None:
        self.packed = packed

    def sample_frames(self, metadata: Any, fps: float, **_: Any) -> Any:
        return np.arange(0, metadata.total_num_frames, int(metadata.fps / fps))

    def __call__(self, videos: Any, video_metadata: Any, do_sample_frames: bool, **_: Any) -> BatchFeature:
        assert not do_sample_frames
        pixels = [torch.from_numpy(video).permute(0, 3, 1, 2) / 255 - 0.5 for video in videos]
        if not self.packed:
            cropped = torch.stack([frames[..., :SMALL_CROP, :SMALL_CROP] for frames in pixels])
            return BatchFeature({"pixel_values_videos": cropped})
        grids, patches = [], []
        for frames in pixels:
            paired = torch.cat((frames, frames[-1:])) if len(frames) % 2 else frames
            grids.append([len(paired) // 2, frames.shape[2] // PATCH, frames.shape[3] // PATCH])
            patches.append(paired.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).reshape(-1, 2 * 3 * PATCH**2))
        grid = torch.tensor(grids)
        data = {
            "pixel_values_videos": torch.cat(patches),
            "video_grid_thw": grid,
            "video_metadata": make_batched_metadata(videos, video_metadata),
        }
        return BatchFeature(data)


def load_video_vlm(folder: Path, name: str) -> Any:
    """The loaded model; its video processor is transformers' own, or where that cannot be, one that stands in."""
    model = tp.load(write_video_vlm(folder, name))
    if name in STOOD_IN and not is_torchvision_available():
        model.processor.video_processor = PlainVideos(packed=name == "qwen2_5_vl")
    return model


def write_video_vlm(folder: Path, name: str) -> Path:
    """A checkpoint folder with a processor of videos at the tiny sizes, and a chat template that knows them."""
    write_vlm(folder, name)
    path = folder / "video_preprocessor_config.json"
    path.write_text(json.dumps({"video_processor_type": VIDEO_PROCESSORS[name], **_sizes(name)}), encoding="utf-8")
    if name == "ernie4_5_vl_moe":  # draws the time on each frame
        import matplotlib  # which has a font

        fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
        shutil.copy(fonts / "DejaVuSans.ttf", folder / "Roboto-Regular.ttf")
    template = chat_template(name)
    image = marks(name)
    known = f"{{% elif part['type'] == 'video' %}}{video_marks(name)}{{% else %}}"
    (folder / "chat_template.jinja").write_text(template.replace("{% else %}", known), encoding="utf-8")
    assert image in template
    return folder


def video_token(name: str) -> str:
    """What stands for a video in a prompt."""
    return next(token for token in TOKENS[name] if token.lower() in ("<video>", "<|video_pad|>", "<|video|>"))


def video_marks(name: str) -> str:
    """What the chat template writes for a video."""
    token = video_token(name)
    if name in GLM:
        return f"<|begin_of_video|>{token}<|end_of_video|>"
    return marks(name).replace(placeholder(name), token)


def clip(frames: int = 6, height: int = 24, width: int = 32, seed: int = 0) -> np.ndarray[Any, Any]:
    """A video as an array [frames, height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def write_film(path: Path, frames: Any, rate: float) -> Path:
    """A video file without losses, of an array [frames, height, width, 3]; needs OpenCV."""
    cv2 = pytest.importorskip("cv2", reason="video files are written with OpenCV")
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"FFV1"), rate, frames.shape[2:0:-1])
    assert writer.isOpened()
    for frame in frames:
        writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    writer.release()
    return path


def _sizes(name: str) -> dict[str, Any]:
    square, small = ({"height": side, "width": side} for side in (CROP, SMALL_CROP))
    if name == "llava_onevision":
        return {"size": small}
    if name in ("video_llava", "llava_next_video"):
        return {"size": {"shortest_edge": CROP}, "crop_size": square}
    other: dict[str, dict[str, Any]] = {
        "video_llama_3": {"temporal_patch_size": 1},
        "ernie4_5_vl_moe": {"draw_on_frames": True, "font": "Roboto-Regular.ttf"},
    }
    return {**PACKED, "patch_size": PATCH, **other.get(name, {})}
