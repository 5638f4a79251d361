"""Tiny checkpoints with random weights, and a task of lmms-eval with generated pictures: nothing is downloaded."""

from __future__ import annotations

import json
import string
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

from tokenprune.testing.tiny_checkpoints import write_tiny_llava

QUESTIONS = ["What is it?", "Is it round? Answer yes or no.", "Which colour?", "How many are there?"]
SIZES = [(224, 224), (224, 448), (448, 224), (224, 224)]  # of the pictures, multiples of 28 and of 32
TEMPLATE = (
    "{% for turn in messages %}{{ turn['role'].upper() }}: {% if turn['content'] is string %}{{ turn['content'] }}"
    "{% else %}{% for part in turn['content'] %}{% if part['type'] == 'image' %}IMAGE"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
IMAGE, VIDEO, START, END = 100, 101, 102, 103
FUNCTIONS = """
def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]

def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]
"""
TASK = """
task: tiny_vqa
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 6}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def write_task(folder: Path, *, kind: str = "generate_until", more: str = "") -> Path:
    """The task `tiny_vqa`, for --include_path: four questions about pictures of two sizes.

    Args:
        folder: made if it is not there.
        kind: the task's output_type.
        more: further lines of its file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for number, (width, height) in enumerate(SIZES):
        pixels = np.random.default_rng(number).integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        pictures.append(Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST))
    features = {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
    rows = {"image": pictures, "question": QUESTIONS, "answer": ["yes"] * len(QUESTIONS)}
    datasets.Dataset.from_dict(rows, datasets.Features(features)).to_parquet(folder / "tiny.parquet")
    (folder / "utils.py").write_text(FUNCTIONS)
    (folder / "tiny_vqa.yaml").write_text(TASK.format(data=folder / "tiny.parquet", kind=kind) + more)
    return folder


def write_llava(folder: Path) -> Path:
    """64 image tokens whatever the picture's size, four decoder layers."""
    write_tiny_llava(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("IMAGE", "<image>"))
    return folder


def write_qwen(folder: Path, version: str) -> Path:
    """Four decoder layers, one token per character, and an image token for 28 x 28 pixels (2.5) or 32 x 32 (3).

    Args:
        folder: made if it is not there.
        version: "2_5" or "3".
    """
    sizes = {"hidden_size": 32, "intermediate_size": 48, "initializer_range": 0.2}
    text = {**sizes, "vocab_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    tower = {**sizes, "depth": 2, "num_heads": 4, "out_hidden_size": 32}
    tower |= {"fullatt_block_indexes": [1]} if version == "2_5" else {"deepstack_visual_indexes": [0], "patch_size": 16}
    text |= {} if version == "2_5" else {"head_dim": 8}
    special = {"<|image_pad|>": IMAGE, "<|video_pad|>": VIDEO, "<|vision_start|>": START, "<|vision_end|>": END}
    config = getattr(transformers, f"Qwen{version}{'_' if version == '2_5' else ''}VLConfig")(
        text_config={**text, "rope_scaling": rope, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        vision_config=tower,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    _tokenizer(special).save_pretrained(folder)
    transformers.Qwen2VLImageProcessor(patch_size=14 if version == "2_5" else 16).save_pretrained(folder)
    family, video = ("Qwen2_5_VL", "Qwen2VL") if version == "2_5" else ("Qwen3VL", "Qwen3VL")
    for name, entry in {
        "processor_config": {"processor_class": f"{family}Processor"},
        "video_preprocessor_config": {"video_processor_type": f"{video}VideoProcessor"},
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(entry))
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("IMAGE", image))
    return folder


def _tokenizer(special: dict[str, int]) -> PreTrainedTokenizerFast:
    special = {"<pad>": 0, "<s>": 1, "</s>": 2, **special}
    characters = {character: 3 + place for place, character in enumerate(string.printable[:95] + "\n\t")}
    core = Tokenizer(models.BPE({**characters, **special}, [], unk_token="</s>"))
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
