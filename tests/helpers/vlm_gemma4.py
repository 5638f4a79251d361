"""Tiny configurations of Gemma 4, with and without a tower, and inputs for them: patches and their places."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from vlm_configs import ALTERNATING, END, IMAGE, PATCH, START, TEXT, TEXT_MODEL, VIDEO
from vlm_inputs import AttentionCall, Pictures, spans_of, wrapped


def gemma4_unified(table: int = 16) -> Any:
    """Pictures of patches of 8 x 8 pixels; heads of full layers are wider than those of sliding ones.

    Args:
        table: places on an axis of a picture.
    """
    return transformers.Gemma4UnifiedConfig(
        text_config={
            **TEXT_MODEL,
            "head_dim": 8,
            "global_head_dim": 16,
            "layer_types": ALTERNATING,
            "sliding_window": 12,
        },
        vision_config={
            "patch_size": PATCH,
            "pooling_kernel_size": 2,
            "mm_embed_dim": 32,
            "mm_posemb_size": table,
            "output_proj_dims": 32,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=120,
        boi_token_id=START,
        eoi_token_id=END,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )


def gemma4(table: int = 32) -> Any:
    """Tokens of 2 x 2 patches, without per-layer embeddings. Argument as of `gemma4_unified`."""
    text = {**gemma4_unified().text_config.to_dict(), "hidden_size_per_layer_input": 0}
    del text["model_type"]
    return transformers.Gemma4Config(
        text_config=text,
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "pooling_kernel_size": 2,
            "patch_size": PATCH,
            "position_embedding_size": table,
            "initializer_range": 0.2,
        },
        audio_config=None,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=120,
        boi_token_id=START,
        eoi_token_id=END,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )


def _patches(pictures: list[Tensor], side: int) -> tuple[Tensor, Tensor, list[int]]:
    """Patches of pictures [3, height, width], their columns and rows (-1 for padding), and tokens of 8 x 8 pixels."""
    patches, places = [], []
    for picture in pictures:
        rows, columns = picture.shape[1] // side, picture.shape[2] // side
        cut = picture.view(3, rows, side, columns, side).permute(1, 3, 2, 4, 0)
        patches.append(cut.reshape(rows * columns, -1))
        places.append(torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(-1))
    pad = torch.nn.utils.rnn.pad_sequence
    counts = [len(one) * side**2 // 64 for one in patches]
    return pad(patches, True), pad(places, True, -1), counts


def _side(config: Any) -> int:
    """Of a patch; Gemma 4 unified is given merged ones."""
    return 8 if config.model_type == "gemma4_unified" else PATCH


def see_gemma4(config: Any, pictures: Pictures) -> AttentionCall:
    flat = [torch.tensor(np.asarray(one)).permute(2, 0, 1) / 255 for row in pictures for one in row]
    whole = [one[:, : one.shape[1] // 8 * 8, : one.shape[2] // 8 * 8] for one in flat]
    patches, places, counts = _patches(whole, _side(config))
    return {"pixel_values": patches, "image_position_ids": places}, spans_of(pictures, counts, wrapped)


def watch_gemma4(config: Any, videos: list[tuple[int, int, int]], draw: torch.Generator) -> AttentionCall:
    """The time is written before every frame."""
    frames = [torch.rand(3, height, width, generator=draw) for t, height, width in videos for _ in range(t)]
    patches, places, counts = _patches(frames, _side(config))
    left, spans = iter(counts), []
    for t, *_ in videos:
        spans.append([[token for _ in range(t) for token in (TEXT.start, START, *[VIDEO] * next(left), END)]])
    lengths = torch.tensor([t for t, *_ in videos])
    return {"pixel_values_videos": patches, "video_position_ids": places, "num_frames_per_video": lengths}, spans
