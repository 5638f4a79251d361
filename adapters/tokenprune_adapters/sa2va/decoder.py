"""The Qwen2 decoder inside a Sa2VA checkpoint."""

from __future__ import annotations

from typing import Any

from transformers import Qwen2ForCausalLM

from tokenprune.errors import CheckpointError
from tokenprune_adapters.common.checkpoint import Checkpoint, Part
from tokenprune_adapters.common.meta_model import meta_model

PREFIX = "language_model."
EMBEDDING = PREFIX + "model.embed_tokens.weight"
HEAD = "lm_head.weight"
ARCHITECTURE = "Qwen2ForCausalLM"
_REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps")
_FIELDS = (
    *_REQUIRED,
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
)


def build_qwen2(
    checkpoint: Checkpoint, config: dict[str, Any], attn_implementation: str | None = None
) -> Part[Qwen2ForCausalLM]:
    """A decoder on the meta device, and the names of its tensors; its vocabulary is that of the embedding table.

    Args:
        checkpoint: the checkpoint.
        config: the `llm_config` of config.json.
        attn_implementation: as in transformers.

    Raises:
        CheckpointError: it describes no such decoder, or one with sliding windows.
    """
    missing = [name for name in _REQUIRED if config.get(name) is None]
    if missing:
        raise CheckpointError(
            f"{checkpoint.folder}/config.json has no {', '.join(missing)} in its llm_config, which a Qwen2 decoder "
            "requires; use the config.json that belongs to the checkpoint"
        )
    if config.get("use_sliding_window"):
        raise CheckpointError(
            f"{checkpoint.folder}/config.json says use_sliding_window in its llm_config; only decoders that attend to "
            "the whole prompt are supported"
        )
    values = {name: config[name] for name in _FIELDS if config.get(name) is not None}
    rows = checkpoint.shape(EMBEDDING, dims=2)[0]
    values["vocab_size"] = rows
    decoder = meta_model(Qwen2ForCausalLM, values, checkpoint.folder, "Qwen2 decoder", attn_implementation)
    names = {name: PREFIX + name for name in decoder.state_dict()}
    if decoder.config.tie_word_embeddings and PREFIX + HEAD not in checkpoint:
        names[HEAD] = EMBEDDING
    return Part(decoder.eval(), names)
