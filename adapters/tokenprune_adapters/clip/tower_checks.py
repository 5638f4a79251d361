"""Checks that a vision tower is the one that a checkpoint was trained with."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import nn

from tokenprune.errors import CheckpointError
from tokenprune_adapters.common.checkpoint import Checkpoint

COPY = "model.vision_tower."
"""Prefix of the tower's tensors in checkpoints that contain a copy of them."""
ADVICE = "pass vision_tower= the folder of the tower that the checkpoint was trained with"

_NAME = re.compile(r"patch(\d+)(?:-(\d+))?$")
_OPENAI = re.compile(r"clip-vit-(base|large)-patch\d+(?:-\d+)?$")
_OPENAI_SIZES = {"base": (768, 12), "large": (1024, 24)}  # width, layers
_OPENAI_SQUARE = 224  # pixels, if the name does not say
_SAME = 0.02  # allowed relative difference of a copy in reduced precision


def tower_name(config: dict[str, Any]) -> str:
    """The last part of the tower's name in config.json; empty without one."""
    name = str(config.get("mm_vision_tower") or config.get("vision_tower") or "")
    return PurePosixPath(name.replace("\\", "/")).name


def is_openai(config: dict[str, Any]) -> bool:
    """Whether config.json names one of OpenAI's CLIP towers."""
    return _OPENAI.search(tower_name(config)) is not None


def check_tower(
    checkpoint: Checkpoint, config: dict[str, Any], tower: nn.Module, folder: Path, resized: int | None = None
) -> None:
    """Compare a tower with the checkpoint's config.json, the tower's name in it, and the checkpoint's copy, if any.

    Args:
        checkpoint: the checkpoint of the whole model.
        config: its config.json.
        tower: the CLIP vision model, as stored.
        folder: folder of the tower, for messages.
        resized: image size in pixels to which the family, and so perhaps the checkpoint's copy, resizes the tower.

    Raises:
        CheckpointError: they differ, or config.json selects features that the tower does not have.
    """
    found: Any = tower.config
    for what, wanted, actual, source in [*_from_config(config, found), *_from_copy(checkpoint, tower, resized)]:
        if wanted != actual:
            raise CheckpointError(f"vision tower {folder} has {actual} {what}, but {source} says {wanted}; {ADVICE}")
    layer = int(config.get("mm_vision_select_layer", -2))
    layers = found.num_hidden_layers
    if not -layers - 1 <= layer <= layers:
        raise CheckpointError(
            f"vision tower {folder} has {layers} layers, but {checkpoint.folder}/config.json says "
            f"mm_vision_select_layer {layer}; {ADVICE}"
        )
    feature = config.get("mm_vision_select_feature") or "patch"
    if feature != "patch":
        raise CheckpointError(
            f"{checkpoint.folder}/config.json says mm_vision_select_feature {feature!r}, expected 'patch'; models that "
            "use [CLS] as an image token are not supported"
        )
    _refuse_other_weights(checkpoint, tower, folder)


def _from_config(config: dict[str, Any], found: Any) -> Iterator[tuple[str, int, int, str]]:
    """The values in config.json: (name of the value, expected, the tower's, source)."""
    width = config.get("mm_hidden_size")
    if width is not None:
        yield "features per patch", int(width), found.hidden_size, "config.json's mm_hidden_size"
    name = tower_name(config)
    sizes, openai = _NAME.search(name), _OPENAI.search(name)
    source = f"the tower's name in config.json, {name!r},"
    if sizes:
        yield "pixels to a patch's side", int(sizes[1]), found.patch_size, source
    square = sizes and (sizes[2] or (openai and _OPENAI_SQUARE))
    if square:
        yield "pixels to a picture's side", int(square), found.image_size, source
    if openai:
        named_width, layers = _OPENAI_SIZES[openai[1]]
        if named_width == found.hidden_size:
            yield "layers", layers, found.num_hidden_layers, source


def _from_copy(checkpoint: Checkpoint, tower: nn.Module, resized: int | None) -> Iterator[tuple[str, int, int, str]]:
    """The values in the checkpoint's copy of the tower, as in `_from_config`."""
    copy = _copy(checkpoint)
    own = {_flat(name): tensor for name, tensor in tower.state_dict().items()}
    source = f"the copy of the tower in {checkpoint.folder}"
    blocks = {int(found[1]) for name in copy if (found := re.match(r"encoder\.layers\.(\d+)\.", name))}
    config: Any = tower.config
    positions = None if resized is None else 1 + (resized // config.patch_size) ** 2
    if blocks:
        yield "layers", max(blocks) + 1, config.num_hidden_layers, source
    for name in sorted(copy.keys() & own.keys()):
        shape, actual = checkpoint.shape(copy[name]), tuple(own[name].shape)
        if name.endswith("position_embedding.weight") and shape[0] == positions:
            continue
        for wanted, size in zip(shape, actual, strict=False):
            yield f"as a size of {name}", wanted, size, source


def _refuse_other_weights(checkpoint: Checkpoint, tower: nn.Module, folder: Path) -> None:
    """Refuse a tower whose [CLS] embedding differs from the checkpoint's copy."""
    copy = _copy(checkpoint)
    for name, tensor in tower.state_dict().items():
        if _flat(name) != "embeddings.class_embedding" or _flat(name) not in copy:
            continue
        mine, theirs = tensor.float(), checkpoint.tensor(copy[_flat(name)]).float()
        if not torch.allclose(mine, theirs, rtol=_SAME, atol=_SAME * float(theirs.abs().max())):
            raise CheckpointError(
                f"vision tower {folder} has other weights than the copy of the tower in {checkpoint.folder}: it is "
                f"another tower, or the copy was trained further; {ADVICE}"
            )


def _copy(checkpoint: Checkpoint) -> dict[str, str]:
    """The names of the copy's tensors, by their names in the tower."""
    return {_flat(name): name for name in checkpoint.names() if name.startswith(COPY)}


def _flat(name: str) -> str:
    return re.sub(r"^(?:model\.)?(?:vision_tower\.)*(?:vision_model\.)?", "", name)
