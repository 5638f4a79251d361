"""Writes tiny PixelLM checkpoints with random weights in the authors' format, of sizes that no released one has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lisa_checkpoints import CONFIG as LISA_CONFIG
from lisa_checkpoints import State, write_checkpoint
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    SamConfig,
    SamMaskDecoderConfig,
    SamPromptEncoderConfig,
    SamVisionConfig,
)

from tokenprune_adapters.pixellm.pixel_decoder import PixelDecoder, stored_name

WIDTH, CHANNELS, FEATURES, SQUARE, PATCH, HEADS = 32, 16, 12, 64, 2, 2
ADDED = {**{f"[SEG{i}]": 640 + i for i in range(6)}, "<im_start>": 646, "<im_end>": 647}
CONFIG: dict[str, Any] = {
    **LISA_CONFIG,
    "architectures": ["PixelLMForCausalLM"],
    "vocab_size": 648,
    "resize_vision_tower_size": SQUARE,
    "sam_mask_decoder_heads": HEADS,
}


def tower_model(layers: int = 10, patch: int = PATCH) -> CLIPVisionModel:
    """A CLIP tower with 24×24 patches, which becomes one of 32×32."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": layers, "num_attention_heads": 2}
    return CLIPVisionModel(CLIPVisionConfig(image_size=24 * patch, patch_size=patch, **sizes))


def pixel_decoder() -> PixelDecoder:
    """A pixel decoder with an odd size in every place."""
    vision = SamVisionConfig(image_size=SQUARE, patch_size=PATCH, num_pos_feats=CHANNELS // 2)
    prompt = SamPromptEncoderConfig(
        hidden_size=CHANNELS, image_size=SQUARE, patch_size=PATCH, mask_input_channels=8, num_point_embeddings=3
    )
    decoder = SamMaskDecoderConfig(
        hidden_size=CHANNELS,
        mlp_dim=20,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_multimask_outputs=2,
        iou_head_depth=4,
        iou_head_hidden_dim=10,
    )
    config = SamConfig(
        vision_config=vision.to_dict(), prompt_encoder_config=prompt.to_dict(), mask_decoder_config=decoder.to_dict()
    )
    return PixelDecoder(config, FEATURES)


def state_dict() -> State:
    """All tensors of a checkpoint, under the authors' names, an outdated rotary table among them."""
    torch.manual_seed(0)
    known = LlamaConfig().to_dict().keys() - {"architectures", "model_type"}
    state: State = dict(LlamaForCausalLM(LlamaConfig(**{k: CONFIG[k] for k in CONFIG if k in known})).state_dict())
    for name, tensor in pixel_decoder().state_dict().items():
        state[stored_name(name, 4)] = tensor
    modules = {
        "mm_projector.": nn.Sequential(nn.Linear(16, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)),
        "out_mm_projector.": nn.Sequential(nn.Linear(16, 20), nn.GELU(), nn.Linear(20, FEATURES)),
        "text_hidden_fcs.0.": nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CHANNELS)),
    }
    for prefix, module in modules.items():
        state.update({f"model.{prefix}{name}": tensor for name, tensor in module.state_dict().items()})
    drawn = torch.Generator().manual_seed(1)
    state = {name: torch.randn(tensor.shape, generator=drawn) * 0.2 for name, tensor in sorted(state.items())}
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.full((4,), 7.0)
    return state


def write_pixellm(
    folder: Path,
    *,
    files: str = "model.safetensors",
    shards: int = 1,
    tower: CLIPVisionModel | None = None,
    with_tower: bool = True,
    config: dict[str, Any] | None = None,
    added: dict[str, int] | None = None,
    edit: Callable[[State], None] | None = None,
) -> Path:
    """Write a checkpoint folder; arguments as for `write_lisa`.

    Args:
        tower: another tower than the usual one.
        with_tower: whether to write one.
    """
    state = state_dict()
    if edit is not None:
        edit(state)
    write_checkpoint(folder, state, {**CONFIG, **(config or {})}, ADDED if added is None else added, files, shards)
    if with_tower:
        write_pixellm_tower(folder / "vision_tower", tower)
    return folder


def write_pixellm_tower(folder: Path, tower: CLIPVisionModel | None = None) -> Path:
    """Write a vision tower alone."""
    torch.manual_seed(2)
    (tower or tower_model()).save_pretrained(folder)
    return folder
