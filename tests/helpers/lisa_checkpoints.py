"""Writes tiny LISA checkpoints with random weights in the authors' format, of sizes that no released one has."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    SamConfig,
    SamMaskDecoderConfig,
    SamModel,
    SamPromptEncoderConfig,
    SamVisionConfig,
)

from tokenprune_adapters.segmentation.sam.weights import original_name

TOKENIZER = Path(__file__).parents[1] / "data" / "llava_tokenizer" / "tokenizer.model"
ADDED = {"[SEG]": 640, "<im_start>": 641, "<im_end>": 642}
WIDTH, CHANNELS, IMAGE_TOKENS = 32, 32, 16
State = dict[str, Tensor]

CONFIG: dict[str, Any] = {
    "architectures": ["LISAForCausalLM"],
    "model_type": "llava",
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "vocab_size": 643,
    "mm_use_im_start_end": True,
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "nobody/no-such-tower",
    "sam_mask_decoder_heads": 4,
}


def sam_model() -> SamModel:
    """A SAM with an odd size in every place: 64 px, patch 8, window 3, layer 1 global, 32 channels."""
    vision = SamVisionConfig(
        hidden_size=24,
        output_channels=CHANNELS,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=64,
        patch_size=8,
        window_size=3,
        global_attn_indexes=[1],
        num_pos_feats=CHANNELS // 2,
        mlp_dim=40,
    )
    prompt = SamPromptEncoderConfig(hidden_size=CHANNELS, image_size=64, patch_size=8, mask_input_channels=8)
    decoder = SamMaskDecoderConfig(
        hidden_size=CHANNELS,
        mlp_dim=56,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_multimask_outputs=2,
        iou_head_depth=4,
        iou_head_hidden_dim=20,
        layer_norm_eps=1e-5,
    )
    return SamModel(
        SamConfig(
            vision_config=vision.to_dict(),
            prompt_encoder_config=prompt.to_dict(),
            mask_decoder_config=decoder.to_dict(),
        )
    )


def tower_model() -> CLIPVisionModel:
    """A CLIP tower of 3 layers with 4×4 patches."""
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        )
    )


def state_dict() -> State:
    """All tensors of a checkpoint, under the authors' names, an outdated rotary table among them."""
    torch.manual_seed(0)
    sizes = {
        name: CONFIG[name]
        for name in CONFIG
        if name in LlamaConfig().to_dict() and name not in ("architectures", "model_type")
    }
    state: State = dict(LlamaForCausalLM(LlamaConfig(**sizes)).state_dict())
    sam = sam_model()
    for name, tensor in sam.state_dict().items():
        state["model.visual_model." + original_name(name, 4)] = tensor
    projector = nn.Linear(16, WIDTH)
    head = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CHANNELS))
    state.update({"model.mm_projector." + name: tensor for name, tensor in projector.state_dict().items()})
    state.update({"model.text_hidden_fcs.0." + name: tensor for name, tensor in head.state_dict().items()})
    drawn = torch.Generator().manual_seed(1)
    state = {name: torch.randn(tensor.shape, generator=drawn) * 0.2 for name, tensor in sorted(state.items())}
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.full((4,), 7.0)
    return state


def write_lisa(
    folder: Path,
    *,
    files: str = "model.safetensors",
    shards: int = 1,
    tower: bool = True,
    config: dict[str, Any] | None = None,
    added: dict[str, int] | None = None,
    edit: Callable[[State], None] | None = None,
) -> Path:
    """Write a checkpoint folder.

    Args:
        folder: made if it is not there.
        files: "model.safetensors" or "pytorch_model.bin".
        shards: number of weight files.
        tower: with the folder `vision_tower` in it.
        config: changes to config.json.
        added: the added tokens.
        edit: changes the tensors before they are written.
    """
    state = state_dict()
    if edit is not None:
        edit(state)
    write_checkpoint(folder, state, {**CONFIG, **(config or {})}, ADDED if added is None else added, files, shards)
    if tower:
        write_tower(folder / "vision_tower")
    return folder


def write_checkpoint(
    folder: Path, state: State, config: dict[str, Any], added: dict[str, int], files: str, shards: int
) -> None:
    """Write weights, config.json and tokenizer of any family; arguments as for `write_lisa`."""
    folder.mkdir(parents=True, exist_ok=True)
    stem, kind = files.rsplit(".", 1)
    names = [files] if shards == 1 else [f"{stem}-{i + 1:05d}-of-{shards:05d}.{kind}" for i in range(shards)]
    parts: list[State] = [{} for _ in names]
    for number, (name, tensor) in enumerate(state.items()):
        parts[number % shards][name] = tensor.contiguous()
    for file, part in zip(names, parts, strict=True):
        if kind == "safetensors":
            save_file(part, folder / file)
        else:
            torch.save(part, folder / file)
    if shards > 1:
        index = {name: file for file, part in zip(names, parts, strict=True) for name in part}
        (folder / f"{files}.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "added_tokens.json").write_text(json.dumps(added))
    shutil.copy(TOKENIZER, folder / "tokenizer.model")


def write_tower(folder: Path) -> Path:
    """Write the vision tower alone."""
    torch.manual_seed(2)
    tower_model().save_pretrained(folder)
    return folder
