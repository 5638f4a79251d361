"""Write what was trained as a folder that `tokenprune_adapters.photos` loads: float16, the layers in use only."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from head import Eyes
from model import PhotoModel
from safetensors.torch import save_file
from torch import Tensor

from tokenprune_adapters.photos.adapter import MODEL_TYPE, WEIGHTS


def delta(eyes: Eyes, model: PhotoModel, depth: int) -> dict[str, Tensor]:
    """The tensors by the names that `tokenprune_adapters.photos.adapter.assemble` knows.

    Args:
        eyes: with the trained head.
        model: trained.
        depth: how many layers of the decoder are taken; there is a tap after the last.
    """
    found = {}
    for name, value in model.trained().items():
        if name.startswith("decoder.model.layers.") and int(name.split(".")[3]) < depth:
            found[name] = value
    parts = {"projector": model.projector, "mask_projection": model.taps[str(depth)].read}
    parts |= {"standardise": eyes.standardise, "head": eyes.head}
    for part, module in parts.items():
        found |= {f"{part}.{name}": value for name, value in module.state_dict().items()}
    return found


def export(eyes: Eyes, model: PhotoModel, depth: int, folder: Path) -> None:
    """Write `config.json` and the weights into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    half = {
        name: value.detach().to(torch.float16).clone().contiguous() for name, value in delta(eyes, model, depth).items()
    }
    save_file(half, folder / WEIGHTS, metadata={"format": "pt"})
    config = {"model_type": MODEL_TYPE, "num_hidden_layers": depth}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
