"""Options of `tokenprune.load` that adapters share, and their checks."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import torch

from tokenprune.errors import OptionError, nearest
from tokenprune.loading.device_names import DTYPES, unknown_device
from tokenprune.utils.arguments import instance, shown
from tokenprune.utils.files import expanded

BITS = ("load_in_4bit", "load_in_8bit")
KINDS = {name: getattr(torch, name) for name in DTYPES}


@dataclass(frozen=True)
class LoadOptions:
    """Options of `tokenprune.load` for a segmentation checkpoint. A family with more options adds fields.

    Args:
        vision_tower: folder or hub id of the CLIP model, which released checkpoints do not contain. By default the
            folder `vision_tower` in the checkpoint, else the name in its config.json.
        dtype: dtype of all weights; by default float32 on a CPU and the stored dtype elsewhere.
        device: device of all parts; the CPU by default.
        device_map: distributes the decoder over devices (needs accelerate); the other parts are placed with its
            embedding table.
        attn_implementation: of decoder and tower, as in transformers.
        quantization_config: of the decoder's linear layers, as in transformers; they are quantised after loading, so
            that main memory must hold the decoder in `dtype` once.
    """

    vision_tower: str | Path | None = None
    dtype: torch.dtype | str | None = None
    device: torch.device | str | None = None
    device_map: str | dict[str, Any] | None = None
    attn_implementation: str | None = None
    quantization_config: Any = None

    def __post_init__(self) -> None:
        """Raises OptionError for values of the wrong type; see also `torch_device` and `torch_dtype`."""
        check_strings(device_map=self.device_map, attn_implementation=self.attn_implementation)
        tower = self.vision_tower
        instance("vision_tower", tower, (NoneType, str, Path), "the folder or hub id of the tower")


def refuse_unknown(given: Iterable[str], known: Collection[str], family: str) -> None:
    """Raises OptionError for a load option that a family does not have."""
    for name in given:
        if name not in known:
            if name in BITS:
                raise OptionError(
                    f"{name}= is no option of {family}; pass quantization_config="
                    f"transformers.BitsAndBytesConfig({name}=True), which needs the package bitsandbytes"
                )
            near = nearest(name, known)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise OptionError(f"{family} models have no load option {name!r}; {hint}options: {', '.join(known)}")


def check_strings(**given: object) -> None:
    """Raises OptionError for a load option that is not a string or None; a device map may also be a dict."""
    for name, value in given.items():
        if name == "device_map":
            instance(name, value, (NoneType, str, dict), "'auto' or a dict from module names to devices")
        else:
            instance(name, value, (NoneType, str), "a string, as in transformers")


def check_one_placement(device: object, device_map: object) -> None:
    """Raises OptionError if both are given."""
    if device is not None and device_map is not None:
        raise OptionError("both device= and device_map= are given; pass one of them")


def torch_device(device: torch.device | str | None) -> torch.device:
    """A device from its name, the CPU by default. Raises OptionError for one that does not exist."""
    instance("device", device, (NoneType, str, torch.device), "'cpu', 'cuda', 'cuda:1' or a torch.device")
    try:
        found = torch.device("cpu" if device is None else device)
    except RuntimeError as error:
        raise unknown_device(str(device)) from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"device {str(found)!r} requested, but torch finds no CUDA device; use device='cpu'")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        there = f"'cuda:0' … 'cuda:{torch.cuda.device_count() - 1}'"
        raise OptionError(f"device {str(found)!r} requested, but torch finds only {there}; use one of them")
    return found


def torch_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype from its name; None stays None. Raises OptionError for a dtype that weights cannot have."""
    if dtype is None:
        return None
    found = KINDS.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or found not in KINDS.values():
        raise OptionError(f"dtype {shown(dtype)} found, expected one of {', '.join(DTYPES)}")
    return found


def shown_name(source: str | Path) -> str:
    """The model's name in reports: the folder's name, or the part of a hub id after the slash."""
    path = expanded(source)
    return path.resolve().name if path.is_dir() else path.name
