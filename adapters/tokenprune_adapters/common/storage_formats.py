"""Storage formats of checkpoints that are not supported, each refused with a specific message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenprune.errors import CheckpointError
from tokenprune_adapters.common.checkpoint import Checkpoint

_QUANTISED = (".SCB", ".absmax", ".quant_map", ".weight_format", ".qweight", ".qzeros", ".weight_scale_inv")


def refuse_quantised(folder: Path, config: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Raise CheckpointError if config.json or the tensors' names show that the weights are quantised."""
    declared = config.get("quantization_config")
    marks = [name for name in checkpoint.names() if name.endswith(_QUANTISED) or ".quant_state." in name]
    if not declared and not marks:
        return
    method = declared.get("quant_method") if isinstance(declared, dict) else declared
    reason = f"quantization_config {method!r} in config.json" if declared else f"the tensor {marks[0]}"
    raise CheckpointError(
        f"{folder} contains quantised weights ({reason}), which segmentation models do not support; use the checkpoint "
        "that it was made from, and save memory with dtype='bfloat16' or device_map='auto'"
    )


def refuse_wrapped(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for a state dict that was saved from a model wrapped by peft or data parallelism."""
    names = checkpoint.names()
    factors = [name for name in names if ".lora_" in name]
    if factors:
        raise CheckpointError(
            f"{checkpoint.folder} contains unmerged LoRA tensors among its weights ({len(factors)}, such as "
            f"{factors[0]}), whose scale is not stored with them; merge them as the training code does (for LISA: "
            "merge_lora_weights_and_save_hf_model.py), or save the adapter in a folder with adapter_config.json"
        )
    for prefix, wrapper in (("base_model.model.", "peft"), ("module.", "a data-parallel wrapper")):
        if names and all(name.startswith(prefix) for name in names):
            raise CheckpointError(
                f"{checkpoint.folder} was saved with {wrapper} around the model: the names of all tensors begin with "
                f"{prefix!r}; save the model inside the wrapper"
            )
