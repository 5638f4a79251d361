"""A tiny checkpoint of the authors' format: random weights, a tokenizer of words, and the code of its classes."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.dynamic_module_utils import get_class_from_dynamic_module

CODE = Path(__file__).parent / "remote_code"
CONTEXT, WORDS = "<IMG_CONTEXT>", [f"w{number}" for number in range(60)]
IMAGE = len(WORDS)
TILES = [2, 1]  # of the picture in each prompt; a tile gives 2 × 2 tokens
PROMPTS = [[1, 5, *[IMAGE] * 8, 7, 8], [1, *[IMAGE] * 4, 9, 10, 11]]


def write_checkpoint(folder: Path) -> Path:
    """Write it into a new folder."""
    shutil.copytree(CODE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": IMAGE + 4, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    about = {
        "model_type": "internvl_chat",
        "architectures": ["InternVLChatModel"],
        "auto_map": {
            "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
            "AutoModel": "modeling_internvl_chat.InternVLChatModel",
        },
        "llm_config": {**sizes, **heads},
    }
    (folder / "config.json").write_text(json.dumps(about))
    model_class: Any = get_class_from_dynamic_module("modeling_internvl_chat.InternVLChatModel", str(folder))
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**about))
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(about))
    words = Tokenizer(WordLevel({word: number for number, word in enumerate([*WORDS, CONTEXT, "<unk>"])}, "<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    sys.modules.pop(model_class.__module__, None)
    return folder


def prompts(rows: Sequence[int]) -> dict[str, Tensor]:
    """These prompts as one batch, padded on the left, with the tiles of their pictures."""
    longest = max(len(PROMPTS[row]) for row in rows)
    gaps = [longest - len(PROMPTS[row]) for row in rows]
    tiles = [torch.rand(TILES[row], 3, 16, 16, generator=torch.Generator().manual_seed(row)) for row in rows]
    return {
        "input_ids": torch.tensor([[0] * gap + PROMPTS[row] for gap, row in zip(gaps, rows, strict=True)]),
        "attention_mask": torch.tensor([[0] * gap + [1] * (longest - gap) for gap in gaps]),
        "pixel_values": torch.cat(tiles),
    }
