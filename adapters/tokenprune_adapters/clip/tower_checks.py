"""What a checkpoint says of the vision tower that it was trained with, compared with the tower that is to be used."""

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
"""What the names of the tower's tensors begin with where a checkpoint holds a copy of them."""
CURE = "pass vision_tower= the folder of the tower that the checkpoint was trained with"

_NAME = re.compile(r"patch(\d+)(?:-(\d+))?$")
_OPENAI = re.compile(r"clip-vit-(base|large)-patch\d+(?:-\d+)?$")
_OPENAI_SIZES = {"base": (768, 12), "large": (1024, 24)}  # width, layers
_OPENAI_SQUARE = 224  # pixels, where the name does not say
_SAME = 0.02  # allowed relative difference of a copy in reduced precision


def tower_name(config: dict[str, Any]) -> str:
    """The name of the tower in config.json, without what is before it; empty where there is none."""
    name = str(config.get("mm_vision_tower") or config.get("vision_tower") or "")
    return PurePosixPath(name.replace("\\", "/")).name


def is_openai(config: dict[str, Any]) -> bool:
    """Whether config.json names one of OpenAI's CLIP towers."""
    return _OPENAI.search(tower_name(config)) is not None


def check_tower(
    checkpoint: Checkpoint, config: dict[str, Any], tower: nn.Module, folder: Path, resized: int | None = None
) -> None:
    """Hold a tower against the checkpoint's config.json, the tower's name there, and a copy of it among the tensors.

    Args:
        checkpoint: of the whole model.
        config: its config.json.
        tower: the CLIP vision model, as it is stored.
        folder: of the tower, for messages.
        resized: side in pixels that the family resizes the tower to, as the checkpoint's copy may have been.

    Raises:
        CheckpointError: they disagree, or config.json asks for features that the tower does not have.
    """
    found: Any = tower.config
    for what, wanted, actual, source in [*_told(config, found), *_copied(checkpoint, tower, resized)]:
        if wanted != actual:
            raise CheckpointError(f"vision tower {folder} has {actual} {what}, but {source} says {wanted}; {CURE}")
    layer = int(config.get("mm_vision_select_layer", -2))
    layers = found.num_hidden_layers
    if not -layers - 1 <= layer <= layers:
        raise CheckpointError(
            f"vision tower {folder} has {layers} layers, but {checkpoint.folder}/config.json says "
            f"mm_vision_select_layer {layer}; {CURE}"
        )
    feature = config.get("mm_vision_select_feature") or "patch"
    if feature != "patch":
        raise CheckpointError(
            f"{checkpoint.folder}/config.json says mm_vision_select_feature {feature!r}, expected 'patch'; models that "
            "take [CLS] for an image token are not supported"
        )
    _refuse_other_weights(checkpoint, tower, folder)


def _told(config: dict[str, Any], found: Any) -> Iterator[tuple[str, int, int, str]]:
    """What config.json says: (of what, how many, how many the tower has, where it is said)."""
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


def _copied(checkpoint: Checkpoint, tower: nn.Module, resized: int | None) -> Iterator[tuple[str, int, int, str]]:
    """What a copy of the tower among the checkpoint's tensors says, as in `_told`."""
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
    """A copy of the tower whose [CLS] embedding is another one is of another tower, or was trained on."""
    copy = _copy(checkpoint)
    for name, tensor in tower.state_dict().items():
        if _flat(name) != "embeddings.class_embedding" or _flat(name) not in copy:
            continue
        mine, theirs = tensor.float(), checkpoint.tensor(copy[_flat(name)]).float()
        if not torch.allclose(mine, theirs, rtol=_SAME, atol=_SAME * float(theirs.abs().max())):
            raise CheckpointError(
                f"vision tower {folder} has other weights than the copy of the tower in {checkpoint.folder}: it is "
                f"another tower, or the checkpoint's was trained further; {CURE}"
            )


def _copy(checkpoint: Checkpoint) -> dict[str, str]:
    """The copy's tensors by their plain names."""
    return {_flat(name): name for name in checkpoint.names() if name.startswith(COPY)}


def _flat(name: str) -> str:
    return re.sub(r"^(?:model\.)?(?:vision_tower\.)*(?:vision_model\.)?", "", name)
