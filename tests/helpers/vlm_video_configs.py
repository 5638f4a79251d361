"""Tiny configurations of transformers' vision-language models that take videos or packed pages, and their inputs."""

from __future__ import annotations

from typing import Any

import torch
from vlm_configs import CROP, VIDEO, llava_like
from vlm_inputs import AttentionCall


def video_llava() -> Any:
    """Two towers, one of which is for the frames of videos."""
    return llava_like("VideoLlavaConfig", vision_feature_layer=-2, video_token_index=VIDEO)


def watch_video_llava(config: Any, videos: list[tuple[int, int, int]], draw: torch.Generator) -> AttentionCall:
    """[CLS] and 16 patches of every frame."""
    frames = 2 * videos[0][0]  # every video of a batch has as many
    pixels = torch.randn(len(videos), frames, 3, CROP, CROP, generator=draw)
    return {"pixel_values_videos": pixels}, [[[VIDEO] * (17 * frames)]] * len(videos)
