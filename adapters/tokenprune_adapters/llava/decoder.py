"""The LLaMA decoder inside a LLaVA-like checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaForCausalLM

from tokenprune.errors import CheckpointError, OptionError, UnsupportedError
from tokenprune.plugins.attribution import brief
from tokenprune.utils.arguments import shown
from tokenprune_adapters.common.checkpoint import Checkpoint, Part
from tokenprune_adapters.common.meta_model import meta_model

_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "attention_bias",
    "mlp_bias",
    "head_dim",
)
_REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps")


def build_llama(
    checkpoint: Checkpoint, config: dict[str, Any], attn_implementation: str | None = None
) -> Part[LlamaForCausalLM]:
    """A decoder on the meta device, and the names of its tensors in the checkpoint.

    Configuration fields are copied one by one, because the checkpoints have the model type "llava", which transformers
    resolves to an unrelated class. The vocabulary size is the number of rows of the embedding table.

    Raises:
        CheckpointError: config.json lacks a size, or its sizes are inconsistent.
    """
    missing = [name for name in _REQUIRED if config.get(name) is None]
    if missing:
        raise CheckpointError(
            f"{checkpoint.folder}/config.json has no {', '.join(missing)}, which a LLaMA decoder requires; "
            "use the config.json that belongs to the checkpoint"
        )
    values = {name: config[name] for name in _FIELDS if config.get(name) is not None}
    rows = checkpoint.shape("model.embed_tokens.weight", dims=2)[0]
    values["vocab_size"] = rows
    decoder = meta_model(LlamaForCausalLM, values, checkpoint.folder, "LLaMA decoder", attn_implementation)
    names = {name: name for name in decoder.state_dict()}
    if decoder.config.tie_word_embeddings and "lm_head.weight" not in checkpoint:
        names["lm_head.weight"] = "model.embed_tokens.weight"
    return Part(decoder.eval(), names)


def finish_llama(decoder: LlamaForCausalLM) -> None:
    """Compute the rotary tables in float32, which checkpoints do not contain. Call it after the weights are loaded."""
    decoder.model.rotary_emb = type(decoder.model.rotary_emb)(config=decoder.config)
    decoder.tie_weights()


def is_rotary_table(name: str) -> bool:
    """Whether a tensor is a rotary table; in old checkpoints they have reduced precision, so they are recomputed."""
    return name.endswith("rotary_emb.inv_freq")


def quantised(decoder: LlamaForCausalLM, config: Any, device_map: str | dict[str, Any], name: str) -> LlamaForCausalLM:
    """The decoder with quantised linear layers, placed on its devices, as transformers loads one.

    Args:
        decoder: the decoder with its weights, on the CPU.
        config: a quantisation config of transformers (`BitsAndBytesConfig`, `TorchAoConfig`, …).
        device_map: as in transformers.
        name: the checkpoint, for messages.

    Raises:
        OptionError: transformers does not accept the config or the map.
        UnsupportedError: the package of that quantisation is not installed.
    """
    try:
        made: LlamaForCausalLM = type(decoder).from_pretrained(
            None,
            config=decoder.config,
            state_dict=decoder.state_dict(),
            dtype=decoder.dtype,
            attn_implementation=decoder.config._attn_implementation,
            quantization_config=config,
            device_map=device_map,
        )
    except ImportError as error:
        raise UnsupportedError(f"{name} needs a package that is not installed, install it ({brief(error)})") from error
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise OptionError(
            f"quantization_config={shown(config)} found, but transformers does not accept it for {name} "
            f"({brief(error)}); pass one of its quantisation configs, or load with dtype='bfloat16'"
        ) from error
    made.eval()
    return made


def place(decoder: LlamaForCausalLM, device_map: str | dict[str, Any]) -> torch.device:
    """Distribute a decoder over devices with accelerate.

    Args:
        decoder: the decoder, on the CPU.
        device_map: a strategy name of accelerate ("auto", "balanced", "sequential"), a device, or a dict from module
            names to devices.

    Returns:
        The device of the embedding table, on which the other parts of the model should be placed.

    Raises:
        UnsupportedError: accelerate is not installed.
        OptionError: accelerate does not accept the map.
    """
    try:
        import accelerate
    except ImportError as error:
        raise UnsupportedError("device_map= requires the package accelerate; install it, or use device=") from error
    if not isinstance(device_map, str):
        places = device_map
    elif device_map not in ("auto", "balanced", "balanced_low_0", "sequential"):
        places = {"": device_map}
    else:
        blocks = [type(decoder.model.layers[0]).__name__]
        memory = accelerate.utils.get_balanced_memory(
            decoder, no_split_module_classes=blocks, low_zero=device_map == "balanced_low_0"
        )
        limits = None if device_map == "sequential" else memory
        places = accelerate.infer_auto_device_map(decoder, max_memory=limits, no_split_module_classes=blocks)
    try:
        accelerate.dispatch_model(decoder, device_map=places)
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        problem = f"accelerate does not accept it ({brief(error)})"
        raise OptionError(
            f"device_map={shown(device_map)} found, but {problem}; use 'auto', or name devices"
        ) from error
    return home_of(decoder)


def home_of(decoder: LlamaForCausalLM) -> torch.device:
    """The device of the embedding table."""
    table: Any = decoder.model.embed_tokens
    home: torch.device = table.weight.device
    return torch.device("cpu") if home.type == "meta" else home  # offloaded weights are on the meta device
