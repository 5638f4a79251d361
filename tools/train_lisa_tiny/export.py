"""Write the trained model as a LISA checkpoint: original key names, float16 safetensors, the tower in its folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from model import CLIP_MEAN, CLIP_STD, IMAGE_SIZE, MASK_DECODER_HEADS, WIDTH
from safetensors.torch import save_file
from student import Student
from torch import Tensor
from transformers import SamModel

from tokenprune_adapters.segmentation.sam.weights import original_name

TOKENIZER_FILES = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def export(student: Student, sam: SamModel, tokenizer: Path, folder: Path) -> None:
    """Write the checkpoint and its `vision_tower` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer / name, folder / name)
    weights = {
        **student.decoder.state_dict(),
        **_under("model.mm_projector.", student.projector.state_dict()),
        **_under("model.text_hidden_fcs.0.", student.mask_projection.state_dict()),
        **{"model.visual_model." + original_name(name): value for name, value in _sam_weights(sam).items()},
    }
    _save(weights, folder / "model.safetensors")
    _write(folder / "config.json", _config(student))
    _write(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    tower = folder / "vision_tower"
    tower.mkdir(exist_ok=True)
    _save(_under("vision_model.", student.tower.state_dict()), tower / "model.safetensors")
    _write(tower / "config.json", _tower_config(student))
    _write(tower / "preprocessor_config.json", _preprocessor())


def _sam_weights(sam: SamModel) -> dict[str, Tensor]:
    """SAM's state, with relative position tables of zeros: it was trained without them, which is the same."""
    weights = dict(sam.state_dict())
    vision = sam.config.vision_config
    grid = vision.image_size // vision.patch_size
    for layer in range(vision.num_hidden_layers):
        span = grid if layer in vision.global_attn_indexes else vision.window_size
        for axis in "hw":
            table = torch.zeros(2 * span - 1, vision.hidden_size // vision.num_attention_heads)
            weights[f"vision_encoder.layers.{layer}.attn.rel_pos_{axis}"] = table
    return weights


def _under(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in weights.items()}


def _save(weights: dict[str, Tensor], path: Path) -> None:
    half = {name: value.detach().to(torch.float16).clone().contiguous() for name, value in weights.items()}
    save_file(half, path, metadata={"format": "pt"})
    path.chmod(0o644)


def _config(student: Student) -> dict[str, Any]:
    llama = student.decoder.config
    return {
        "architectures": ["LISAForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "freeze_mm_mlp_adapter": False,
        "hidden_act": llama.hidden_act,
        "hidden_size": llama.hidden_size,
        "image_aspect_ratio": "square",
        "initializer_range": llama.initializer_range,
        "intermediate_size": llama.intermediate_size,
        "max_position_embeddings": llama.max_position_embeddings,
        "mm_hidden_size": WIDTH,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": True,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "vision_tower",
        "model_type": "llava",
        "num_attention_heads": llama.num_attention_heads,
        "num_hidden_layers": llama.num_hidden_layers,
        "num_key_value_heads": llama.num_key_value_heads,
        "out_dim": student.mask_projection[2].out_features,
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rms_norm_eps": llama.rms_norm_eps,
        "rope_scaling": None,
        "sam_mask_decoder_heads": MASK_DECODER_HEADS,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "train_mask_decoder": True,
        "use_cache": False,
        "use_mm_proj": True,
        "vision_tower": "vision_tower",
        "vocab_size": llama.vocab_size,
    }


def _tower_config(student: Student) -> dict[str, Any]:
    config = student.tower.config
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        **{name: getattr(config, name) for name in names},
        "hidden_act": config.hidden_act,
        "layer_norm_eps": config.layer_norm_eps,
        "attention_dropout": 0.0,
        "num_channels": 3,
        "projection_dim": WIDTH,
        "torch_dtype": "float16",
    }


def _preprocessor() -> dict[str, Any]:
    return {
        "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(CLIP_MEAN),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(CLIP_STD),
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": IMAGE_SIZE},
    }


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
