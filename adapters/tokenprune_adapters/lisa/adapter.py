"""Recognising and loading LISA checkpoints in their original format."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokenprune.adapter import Adapter
from tokenprune.errors import CheckpointError, OptionError, nearest
from tokenprune_adapters.checkpoint import Checkpoint, Part, load_parts, read_json, resolve_folder
from tokenprune_adapters.clip import ClipPixels, find_tower, load_tower
from tokenprune_adapters.lisa.model import LisaModel
from tokenprune_adapters.lisa.prompts import SEG_TOKEN
from tokenprune_adapters.llama import build_llama, finish_llama, is_rotary_table, place
from tokenprune_adapters.llava_prompt import IM_END, IM_START
from tokenprune_adapters.sam_weights import build_sam
from tokenprune_adapters.tokenizer import load_tokenizer

SAM_PREFIX = "model.visual_model."
PROJECTOR = "model.mm_projector."
MASK_PROJECTION = "model.text_hidden_fcs.0."
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LisaAdapter(Adapter):
    """LISA checkpoints (7B, 13B, or any size) in the format of their authors."""

    @classmethod
    def matches(cls, source: str, config: Mapping[str, Any]) -> bool:
        """Whether config.json names a LISA architecture."""
        return any(str(name).lower().startswith("lisa") for name in config.get("architectures") or ())

    @classmethod
    def load(cls, source: str, **options: Any) -> LisaModel:
        """Load a checkpoint; `load_lisa` documents the options.

        Raises:
            CheckpointError: see `load_lisa`.
            OptionError: an option that does not exist.
        """
        known = list(inspect.signature(load_lisa).parameters)[1:]
        for name in options:
            if name not in known:
                near = nearest(name, known)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise OptionError(f"LISA models have no load option {name!r}; {hint}options: {', '.join(known)}")
        return load_lisa(source, **options)


def load_lisa(
    source: str | Path,
    vision_tower: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    device_map: str | dict[str, Any] | None = None,
    attn_implementation: str | None = None,
) -> LisaModel:
    """Read a checkpoint onto transformers' own LLaMA, CLIP and SAM.

    Args:
        source: folder or hub id. Weights may be sharded or not, .bin or safetensors.
        vision_tower: folder or hub id of the CLIP model, which released checkpoints do not hold. By default the folder
            `vision_tower` in the checkpoint, else the name in its config.json.
        dtype: of all weights; by default float32 on a CPU and the stored type elsewhere.
        device: where everything goes; the CPU by default.
        device_map: spread the decoder over devices (needs accelerate); the rest goes where its embedding table is.
        attn_implementation: of decoder and tower, as in transformers.

    Raises:
        CheckpointError: a file or tensor is missing, damaged, unexpected or mis-shaped, the tokenizer or the tower
            does not belong to it, or it is of another family.
        OptionError: an unknown dtype or device, or both device= and device_map=.
    """
    if device is not None and device_map is not None:
        raise OptionError("both device= and device_map= are given; give one of them")
    target = _device(device)
    folder = resolve_folder(source)
    config = read_json(folder / "config.json")
    checkpoint = Checkpoint(folder)
    _refuse_other_families(checkpoint, config)
    kind = _dtype(dtype, checkpoint, target, device_map)
    tokenizer = load_tokenizer(
        folder,
        required=[SEG_TOKEN, *([IM_START, IM_END] if config.get("mm_use_im_start_end") else [])],
        rows=checkpoint.shape("model.embed_tokens.weight", dims=2)[0],
    )
    tower_folder = find_tower(folder, config, vision_tower)
    tower = load_tower(tower_folder, kind, attn_implementation)
    reads = checkpoint.shape(PROJECTOR + "weight", dims=2)[1]
    if reads != tower.config.hidden_size:
        raise CheckpointError(
            f"vision tower {tower_folder} has features {tower.config.hidden_size} wide, but the projector of {folder} "
            f"reads {reads}; pass vision_tower= the folder of the tower that the checkpoint was trained with"
        )
    llama = build_llama(checkpoint, config, attn_implementation)
    sam = build_sam(checkpoint, SAM_PREFIX, config.get("sam_mask_decoder_heads"))
    width = llama.module.config.hidden_size
    channels = sam.module.prompt_encoder.hidden_size
    with torch.device("meta"):
        projector = nn.Linear(reads, width)
        mask_projection = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, channels))
    parts: list[Part[Any]] = [
        llama,
        sam,
        Part(projector, {name: PROJECTOR + name for name in projector.state_dict()}),
        Part(mask_projection, {name: MASK_PROJECTION + name for name in mask_projection.state_dict()}),
    ]
    load_parts(checkpoint, parts, kind, ignore=_may_be_left_over)
    decoder = llama.module
    finish_llama(decoder)
    model = LisaModel(
        decoder=decoder,
        tower=tower,
        projector=projector,
        sam=sam.module,
        mask_projection=mask_projection,
        tokenizer=tokenizer,
        clip_pixels=ClipPixels(tower_folder, tower),
        select_layer=int(config.get("mm_vision_select_layer", -2)),
        mark_image=bool(config.get("mm_use_im_start_end", False)),
        name=_shown_name(source),
    ).eval()
    if device_map is None:
        model.to(device=target)
        return model
    home = place(decoder, device_map)
    others: list[nn.Module] = [tower, projector, sam.module, mask_projection]
    for module in others:
        module.to(device=home)
    return model


def _shown_name(source: str | Path) -> str:
    path = Path(source).expanduser()
    return path.resolve().name if path.is_dir() else path.name  # of a hub id the part after the slash


def _refuse_other_families(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    if any(name.startswith(SAM_PREFIX + "image_encoder.") for name in checkpoint.names()):
        return
    raise CheckpointError(
        f"{checkpoint.folder} is no LISA checkpoint: no tensors are under {SAM_PREFIX}image_encoder, and config.json "
        f"says architectures {config.get('architectures')}, model_type {config.get('model_type')!r}; "
        "load it with its own adapter"
    )


def _may_be_left_over(name: str) -> bool:
    # A tower inside the checkpoint is a copy of the one that config.json names, which is what the authors load.
    return is_rotary_table(name) or name.startswith("model.vision_tower.")


def _device(device: torch.device | str | None) -> torch.device:
    try:
        found = torch.device(device or "cpu")
    except RuntimeError as error:
        raise OptionError(f"device {device!r} is unknown; expected e.g. 'cpu', 'cuda' or 'cuda:1'") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"device {str(found)!r} asked for, but torch finds no CUDA device here; use device='cpu'")
    return found


def _dtype(
    dtype: torch.dtype | str | None, checkpoint: Checkpoint, device: torch.device, device_map: object
) -> torch.dtype:
    if dtype is None:
        if device.type == "cpu" and device_map is None:
            return torch.float32
        return checkpoint.tensor("model.embed_tokens.weight").dtype
    found = DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise OptionError(f"dtype {dtype!r} found, expected one of {', '.join(DTYPES)}")
    return found
