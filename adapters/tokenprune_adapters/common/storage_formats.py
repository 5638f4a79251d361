"""Ways of storing a checkpoint that reading tensor by tensor does not cover, each refused by its own name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenprune.errors import CheckpointError
from tokenprune_adapters.common.checkpoint import Checkpoint

_QUANTISED = (".SCB", ".absmax", ".quant_map", ".weight_format", ".qweight", ".qzeros", ".weight_scale_inv")


def refuse_quantised(folder: Path, config: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Raise CheckpointError where config.json or the tensors' names say that the weights are quantised."""
    told = config.get("quantization_config")
    marks = [name for name in checkpoint.names() if name.endswith(_QUANTISED) or ".quant_state." in name]
    if not told and not marks:
        return
    method = told.get("quant_method") if isinstance(told, dict) else told
    reason = f"config.json says quantization_config {method!r}" if told else f"there is {marks[0]}"
    raise CheckpointError(
        f"{folder} holds quantised weights ({reason}), which segmentation models do not read; take the checkpoint that "
        "it was made from, and save memory with dtype='bfloat16' or device_map='auto'"
    )


def refuse_wrapped(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for a state dict saved while peft or a data-parallel wrapper was around the model."""
    names = checkpoint.names()
    factors = [name for name in names if ".lora_" in name]
    if factors:
        raise CheckpointError(
            f"{checkpoint.folder} holds unmerged LoRA tensors among its weights ({len(factors)}, such as "
            f"{factors[0]}), whose scale is not stored with them; merge them as the training code does (for LISA: "
            "merge_lora_weights_and_save_hf_model.py), or save the adapter in a folder with adapter_config.json"
        )
    for prefix, wrapper in (("base_model.model.", "peft"), ("module.", "a data-parallel wrapper")):
        if names and all(name.startswith(prefix) for name in names):
            raise CheckpointError(
                f"{checkpoint.folder} was saved with {wrapper} around the model: every tensor's name begins with "
                f"{prefix!r}; save the model inside it"
            )
