"""Writes tiny Sa2VA checkpoints in the released format, of sizes that no release has.

Weights are computed from their names, so that stored outputs of the authors' code fit them in any release of torch.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

State = dict[str, Tensor]

SAM, TOWER, LANGUAGE = "grounding_encoder.sam2_model.", "vision_model.", "language_model."
WIDTH, TOWER_WIDTH, CHANNELS, TILE, PATCH, SQUARE = 32, 16, 32, 16, 4, 64
TILE_TOKENS = 4
ADDED = ("<|im_end|>", "<|endoftext|>", "<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>", "[SEG]", "<p>", "</p>")
BYTES = sorted(ByteLevel.alphabet())
VOCABULARY = len(BYTES) + len(ADDED)
SEG_ID = len(BYTES) + ADDED.index("[SEG]")
SEG_LOUDER = 4.0  # so that the random model says [SEG] now and then
TRUNK = {"image_size": SQUARE, "heads": 1, "windows": [4, 4, 2, 2], "global_blocks": [3]}
CONFIG: dict[str, Any] = {
    "architectures": ["Sa2VAChatModel"],
    "auto_map": {"AutoModel": "modeling_sa2va_chat.Sa2VAChatModel"},
    "model_type": "sa2va_chat",
    "template": "qwen_chat",
    "select_layer": -1,
    "downsample_ratio": 0.5,
    "ps_version": "v2",
    "dynamic_image_size": True,
    "use_thumbnail": True,
    "force_image_size": TILE,
    "llm_config": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "vocab_size": VOCABULARY,
    },
    "vision_config": {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "hidden_size": TOWER_WIDTH,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": TILE,
        "patch_size": PATCH,
        "qkv_bias": True,
        "qk_normalization": False,
        "norm_type": "layer_norm",
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
    },
    "sam2_trunk": TRUNK,
    "sam_mask_decoder_heads": 4,
}


def _linear(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _mlp(name: str, *widths: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for number, (into, out) in enumerate(pairwise(widths)):
        found |= _linear(f"{name}.layers.{number}", out, into)
    return found


def language_shapes() -> dict[str, tuple[int, ...]]:
    """Tensors of the decoder."""
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, WIDTH),
        "model.norm.weight": (WIDTH,),
        "lm_head.weight": (VOCABULARY, WIDTH),
    }
    for layer in range(4):
        at = f"model.layers.{layer}."
        found |= _linear(f"{at}self_attn.q_proj", WIDTH, WIDTH)
        found |= _linear(f"{at}self_attn.k_proj", WIDTH // 2, WIDTH) | _linear(
            f"{at}self_attn.v_proj", WIDTH // 2, WIDTH
        )
        found |= {f"{at}self_attn.o_proj.weight": (WIDTH, WIDTH)}
        found |= {f"{at}mlp.{name}_proj.weight": (48, WIDTH) for name in ("gate", "up")}
        found |= {f"{at}mlp.down_proj.weight": (WIDTH, 48)}
        found |= {f"{at}{name}_layernorm.weight": (WIDTH,) for name in ("input", "post_attention")}
    return found


def tower_shapes() -> dict[str, tuple[int, ...]]:
    """Tensors of the tower."""
    width = TOWER_WIDTH
    found: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (1, 1, width),
        "embeddings.patch_embedding.weight": (width, 3, PATCH, PATCH),
        "embeddings.patch_embedding.bias": (width,),
        "embeddings.position_embedding": (1, 1 + (TILE // PATCH) ** 2, width),
    }
    for layer in range(3):
        at = f"encoder.layers.{layer}."
        found |= {f"{at}ls1": (width,), f"{at}ls2": (width,)}
        found |= _norm(f"{at}norm1", width) | _norm(f"{at}norm2", width)
        found |= _linear(f"{at}attn.qkv", 3 * width, width) | _linear(f"{at}attn.proj", width, width)
        found |= _linear(f"{at}mlp.fc1", 24, width) | _linear(f"{at}mlp.fc2", width, 24)
    return found


@dataclass(frozen=True)
class SamSizes:
    """Sizes of a SAM 2; by default those of the tiny checkpoints."""

    width: int = 8
    blocks: tuple[int, ...] = (1, 1, 2, 1)
    window: int = 4
    background: int = 3
    channels: int = CHANNELS
    mlp: int = 40
    iou: int = 20


LARGE = SamSizes(144, (2, 6, 36, 4), 8, 7, 256, 2048, 256)
"""SAM 2 on Hiera-L, as in all releases."""


def sam_shapes(sizes: SamSizes = SamSizes()) -> dict[str, tuple[int, ...]]:
    """Tensors of SAM 2, except those for videos."""
    c, trunk, width = sizes.channels, "image_encoder.trunk.", sizes.width
    found: dict[str, tuple[int, ...]] = {
        f"{trunk}patch_embed.proj.weight": (width, 3, 7, 7),
        f"{trunk}patch_embed.proj.bias": (width,),
        f"{trunk}pos_embed": (1, width, sizes.background, sizes.background),
        f"{trunk}pos_embed_window": (1, width, sizes.window, sizes.window),
    }
    outputs = [width * 2**stage for stage, count in enumerate(sizes.blocks) for _ in range(count)]
    for number, (into, out) in enumerate(pairwise([width, *outputs])):
        at = f"{trunk}blocks.{number}."
        found |= _norm(f"{at}norm1", into) | _norm(f"{at}norm2", out)
        found |= _linear(f"{at}attn.qkv", 3 * out, into) | _linear(f"{at}attn.proj", out, out)
        found |= _mlp(f"{at}mlp", out, 4 * out, out)
        if into != out:
            found |= _linear(f"{at}proj", out, into)
    for number in range(4):
        found[f"image_encoder.neck.convs.{number}.conv.weight"] = (c, width * 2 ** (3 - number), 1, 1)
        found[f"image_encoder.neck.convs.{number}.conv.bias"] = (c,)
    prompt, decoder = "sam_prompt_encoder.", "sam_mask_decoder."
    found |= {f"{prompt}point_embeddings.{number}.weight": (1, c) for number in range(4)}
    found |= {f"{prompt}{name}.weight": (1, c) for name in ("not_a_point_embed", "no_mask_embed")}
    found[f"{prompt}pe_layer.positional_encoding_gaussian_matrix"] = (2, c // 2)
    for number, shape in ((0, (4, 1, 2, 2)), (3, (16, 4, 2, 2)), (6, (c, 16, 1, 1))):
        found |= {f"{prompt}mask_downscaling.{number}.weight": shape}
        found |= {f"{prompt}mask_downscaling.{number}.bias": shape[:1]}
    found |= _norm(f"{prompt}mask_downscaling.1", 4) | _norm(f"{prompt}mask_downscaling.4", 16)
    for name, rows in (("iou_token", 1), ("mask_tokens", 4), ("obj_score_token", 1)):
        found[f"{decoder}{name}.weight"] = (rows, c)

    def attention(name: str, inner: int) -> dict[str, tuple[int, ...]]:
        parts = {}
        for part in "qkv":
            parts |= _linear(f"{decoder}transformer.{name}.{part}_proj", inner, c)
        return parts | _linear(f"{decoder}transformer.{name}.out_proj", c, inner)

    for layer in range(2):
        at = f"layers.{layer}."
        found |= attention(f"{at}self_attn", c)
        found |= attention(f"{at}cross_attn_token_to_image", c // 2) | attention(
            f"{at}cross_attn_image_to_token", c // 2
        )
        found |= _mlp(f"{decoder}transformer.{at}mlp", c, sizes.mlp, c)
        for number in range(1, 5):
            found |= _norm(f"{decoder}transformer.{at}norm{number}", c)
    found |= attention("final_attn_token_to_image", c // 2) | _norm(f"{decoder}transformer.norm_final_attn", c)
    for name, shape in (
        ("output_upscaling.0", (c, c // 4, 2, 2)),
        ("output_upscaling.3", (c // 4, c // 8, 2, 2)),
        ("conv_s0", (c // 8, c, 1, 1)),
        ("conv_s1", (c // 4, c, 1, 1)),
    ):
        width = shape[1] if name.startswith("output") else shape[0]
        found |= {f"{decoder}{name}.weight": shape, f"{decoder}{name}.bias": (width,)}
    found |= _norm(f"{decoder}output_upscaling.1", c // 4)
    for number in range(4):
        found |= _mlp(f"{decoder}output_hypernetworks_mlps.{number}", c, c, c, c // 8)
    found |= _mlp(f"{decoder}iou_prediction_head", c, sizes.iou, sizes.iou, 4) | _mlp(
        f"{decoder}pred_obj_score_head", c, c, c, 1
    )
    return found | {"no_mem_embed": (1, 1, c)}


def video_shapes() -> dict[str, tuple[int, ...]]:
    """Some of the tensors of SAM 2 that serve videos alone."""
    found: dict[str, tuple[int, ...]] = {
        "maskmem_tpos_enc": (7, 1, 1, 8),
        "no_mem_pos_enc": (1, 1, CHANNELS),
        "no_obj_ptr": (1, CHANNELS),
        "mask_downsample.weight": (1, 1, 4, 4),
        "mask_downsample.bias": (1,),
        "memory_attention.norm.weight": (CHANNELS,),
        "memory_encoder.fuser.layers.0.g_weight": (CHANNELS,),
    }
    return found | _mlp("obj_ptr_proj", CHANNELS, CHANNELS, CHANNELS, CHANNELS)


def made(name: str, shape: tuple[int, ...]) -> Tensor:
    """The values of a tensor: waves of an odd frequency, with a phase of the name; norms around 1."""
    count = int(torch.tensor(shape).prod())
    phase = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100_003
    waves = torch.sin(torch.arange(count, dtype=torch.float64) * 12.9898 + phase) * 43758.5453
    waves = (waves - waves.floor() - 0.5) * 0.7
    is_norm = len(shape) == 1 and name.endswith(("weight", "ls1", "ls2"))
    return (waves + is_norm).reshape(shape).float()


def state_dict() -> State:
    """All tensors of a checkpoint, under the released names; not to be changed in place."""
    return dict(_weights())


@functools.cache
def _weights() -> State:
    shapes = {
        **{LANGUAGE + name: shape for name, shape in language_shapes().items()},
        **{TOWER + name: shape for name, shape in tower_shapes().items()},
        **{SAM + name: shape for name, shape in (sam_shapes() | video_shapes()).items()},
        **_norm("mlp1.0", 4 * TOWER_WIDTH),
        **_linear("mlp1.1", WIDTH, 4 * TOWER_WIDTH),
        **_linear("mlp1.3", WIDTH, WIDTH),
        **_linear("text_hidden_fcs.0", WIDTH, WIDTH),
        **_linear("text_hidden_fcs.2", CHANNELS, WIDTH),
    }
    state = {name: made(name, shape) for name, shape in sorted(shapes.items())}
    state[LANGUAGE + "lm_head.weight"][SEG_ID] *= SEG_LOUDER
    return state


def write_tokenizer(folder: Path, added: tuple[str, ...] = ADDED) -> None:
    """A tokenizer of single bytes, in the files of a Qwen2 tokenizer."""
    inner = Tokenizer(BPE({piece: number for number, piece in enumerate(BYTES)}, []))
    inner.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = ByteLevelDecoder()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(added),
    )
    tokenizer.save_pretrained(folder)
    about = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**about, "tokenizer_class": "Qwen2Tokenizer"}))


def write_sa2va(
    folder: Path,
    *,
    files: str = "model.safetensors",
    config: dict[str, Any] | None = None,
    added: tuple[str, ...] | None = None,
    edit: Callable[[State], None] | None = None,
) -> Path:
    """Write a checkpoint folder.

    Args:
        folder: made if it is not there.
        files: "model.safetensors" or "pytorch_model.bin".
        config: changes to config.json; a dict changes the one of that name.
        added: the added tokens.
        edit: changes the tensors before they are written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = state_dict()
    if edit is not None:
        edit(state)
    if files.endswith(".bin"):
        torch.save(state, folder / files)
    else:
        save_file(state, folder / files)
    about = dict(CONFIG)
    for name, value in (config or {}).items():
        merged = isinstance(value, dict) and isinstance(about.get(name), dict)
        about[name] = {**about[name], **value} if merged else value
    (folder / "config.json").write_text(json.dumps(about))
    write_tokenizer(folder, ADDED if added is None else added)
    return folder
