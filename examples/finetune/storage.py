"""What a fine-tuning writes: checkpoints that it resumes from, and the folder of the trained model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tokenprune.errors import InputError
from tokenprune.loading.checkpoints import find_checkpoint
from tokenprune.utils.files import replacing
from tokenprune_adapters.common.load_options import LoadOptions
from tokenprune_adapters.segmentation.loading import MASK_PROJECTION, open_checkpoint

STATE, SETTINGS, LOG = "finetuning.pt", "finetuning.json", "finetuning.jsonl"
WEIGHTS = (".safetensors", ".bin", ".index.json", ".pt", ".pth")


class Progress:
    """The checkpoint of a training in a folder: trained weights, optimiser, learning rate, random state, step.

    Args:
        folder: of the training.
        settings: what was asked for; a training is resumed with the same alone.
        weights: the trained parameters by name, changed in place when resumed.
        parts: optimiser and schedule.

    Raises:
        InputError: the folder holds a training with other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], weights: dict[str, torch.Tensor], *parts: Any) -> None:
        self.path, self.weights, self.parts, self.step = folder / STATE, weights, parts, 0
        known = folder / SETTINGS
        if known.is_file() and (found := json.loads(known.read_text())) != settings:
            names = [name for name in settings if found.get(name) != settings[name]]
            asked = ", ".join(f"{name}={found.get(name)!r} (now {settings[name]!r})" for name in names)
            raise InputError(f"{folder} holds a training with {asked}; give another --out, or the same options")
        if not known.is_file() and (folder / "config.json").exists():
            raise InputError(f"{folder} holds another model, which would be overwritten; give another --out")
        folder.mkdir(parents=True, exist_ok=True)
        known.write_text(json.dumps(settings, indent=1) + "\n")
        if self.path.is_file():
            self._resume()

    def _resume(self) -> None:
        state = torch.load(self.path, weights_only=True)
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(state["weights"][name])
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)
        torch.set_rng_state(state["random"])
        self.step = state["step"]

    def save(self, step: int) -> None:
        """Write the checkpoint; the one before stays until this one is whole."""
        self.step = step
        state = {
            "weights": {name: weight.detach() for name, weight in self.weights.items()},
            "parts": [part.state_dict() for part in self.parts],
            "random": torch.get_rng_state(),
            "step": step,
        }
        with replacing(self.path) as target:
            torch.save(state, target)


def save_model(model: Any, source: str, folder: Path) -> None:
    """Write a trained model as a checkpoint of its family, in the layout, and with the types, of the one it came from.

    Args:
        model: LoRA is merged into it.
        source: what it was loaded from.
        folder: that `tokenprune.load` reads then.
    """
    opened = open_checkpoint(find_checkpoint(source)[0], LoadOptions(device="cpu"))
    trained = dict(model.decoder.state_dict())
    trained |= {MASK_PROJECTION + name: value for name, value in model.mask_projection.state_dict().items()}
    tensors = {}
    for name in opened.checkpoint.names():
        stored = opened.checkpoint.tensor(name)
        tensors[name] = trained.get(name, stored).detach().to("cpu", stored.dtype, copy=True).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    for item in opened.folder.iterdir():
        if item.is_dir():
            shutil.copytree(item, folder / item.name, dirs_exist_ok=True)
        elif not item.name.endswith(WEIGHTS) and item.name not in (SETTINGS, LOG):
            shutil.copyfile(item, folder / item.name)
    with replacing(folder / "model.safetensors") as target:
        save_file(tensors, target, metadata={"format": "pt"})
