"""Tiny checkpoints with random weights, for tests without a download. Their answers are meaningless."""

from __future__ import annotations

import json
import string
from pathlib import Path

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, processors
from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedTokenizerFast

_SPECIAL = {"<pad>": 0, "<s>": 1, "</s>": 2}
_CHARACTERS = string.printable[:95] + "\n\t"
_IMAGE = 100
_TEMPLATE = (
    "{% for turn in messages %}{{ turn['role'].upper() }}: {% for part in turn['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}\n"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def write_tiny_llava(folder: str | Path, *, layers: int = 4, side: int = 32, seed: int = 0) -> Path:
    """A complete LLaVA checkpoint of less than a megabyte, with a processor that takes each character as a token.

    Args:
        folder: to write to; created if it does not exist.
        layers: of the decoder.
        side: of the pictures that the tower sees, in pixels; an image has (side / 4)² tokens.
        seed: of the weights.

    Returns:
        The folder, for `tokenprune.load` or `from_pretrained`.
    """
    folder, patch = Path(folder), 4
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "initializer_range": 0.2}
    tower = {**sizes, "num_hidden_layers": 3, "image_size": side, "patch_size": patch, "projection_dim": 32}
    text = {**sizes, "num_hidden_layers": layers, "vocab_size": 128, "pad_token_id": 0, "eos_token_id": 2}
    config = LlavaConfig(
        text_config={"model_type": "llama", **text},
        vision_config={"model_type": "clip_vision_model", "initializer_factor": 4.0, **tower},
        image_token_index=_IMAGE,
        image_seq_length=(side // patch) ** 2,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlavaForConditionalGeneration(config).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    square = {"height": side, "width": side}
    # the one that needs no torchvision, which older releases call by the plain name
    kind = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    kind(size={"shortest_edge": side}, crop_size=square).save_pretrained(folder)
    made = {"patch_size": patch, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "LlavaProcessor", **made}))
    (folder / "chat_template.jinja").write_text(_TEMPLATE, encoding="utf-8")
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    special = {**_SPECIAL, "<image>": _IMAGE}
    vocabulary = {character: len(_SPECIAL) + place for place, character in enumerate(_CHARACTERS)}
    core = Tokenizer(models.BPE({**vocabulary, **special}, [], unk_token="</s>"))
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
