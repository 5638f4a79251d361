"""Instance masks for CSP's `seg_first`, and the instance of each image token."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenprune.errors import InputError, OptionError, UnknownNameError
from tokenprune.plugins import registry
from tokenprune.plugins.entries import Entry

COVERED = 0.5


def segment(segmenter: str | Callable[[Any], Any], image: Any) -> Tensor:
    """Instance masks, bool [n, H, W].

    Args:
        segmenter: name of an installed segmenter (`tokenprune list`), name or folder of a transformers
            image-segmentation checkpoint, or a function of the image.
        image: uint8 [H, W, 3] numpy array.

    Raises:
        OptionError: the checkpoint cannot be loaded.
        PluginError: the installed segmenter failed; names its package.
        InputError: the function did not return masks of this image.
    """
    if isinstance(segmenter, str):
        installed = _installed(segmenter)
        if installed is None:
            return _by_checkpoint(segmenter, image)
        name, found = segmenter, installed.call(image)
    else:
        name, found = getattr(segmenter, "__name__", repr(segmenter)), segmenter(image)
    try:
        masks = torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError):
        masks = None
    if masks is None or masks.dim() != 3 or masks.shape[1:] != image.shape[:2]:
        kind = type(found).__name__ if masks is None else f"masks of shape {list(masks.shape)}"
        raise InputError(
            f"segmenter {name!r}: found {kind}, expected masks [n, {image.shape[0]}, {image.shape[1]}] like the image"
        )
    return masks.bool().cpu()


def _installed(name: str) -> Entry | None:
    try:
        return registry.get("segmenters", name)
    except UnknownNameError:
        return None


def _by_checkpoint(checkpoint: str, image: Any) -> Tensor:
    from PIL import Image

    found = _pipeline(checkpoint)(Image.fromarray(image))
    masks = [torch.from_numpy(np.asarray(one["mask"]) > 0) for one in found]
    return torch.stack(masks) if masks else torch.zeros(0, *image.shape[:2], dtype=torch.bool)


@lru_cache(maxsize=2)
def _pipeline(checkpoint: str) -> Any:
    from transformers import pipeline

    try:
        return pipeline("image-segmentation", model=checkpoint, device="cpu")
    except Exception as error:
        installed = ", ".join(registry.entries("segmenters")) or "none"
        raise OptionError(
            f"option 'segmenter': {checkpoint!r} is not an installed segmenter ({installed}) and cannot be loaded for "
            f"image segmentation ({str(error).splitlines()[0]}); pass an installed segmenter, the name or folder of "
            "such a checkpoint, or a function"
        ) from error


def instance_labels(masks: Tensor, cells: Tensor) -> Tensor:
    """The instance of each token, int64 [n]; the background, 0, counts as an instance (ours).

    A token belongs to the mask that covers most of its cell, if it covers at least half of it (ours).

    Args:
        masks: bool [instances, H, W]; they may overlap, be empty, or cover nothing.
        cells: int64 [n, 2], (row, column) of each token, −1 if it has none (background).
    """
    placed = (cells >= 0).all(1)
    labels = torch.zeros(len(cells), dtype=torch.int64)
    if not len(masks) or not placed.any():
        return labels
    rows, columns = (cells.amax(0) + 1).tolist()
    covered = torch.nn.functional.adaptive_avg_pool2d(masks[:, None].float(), (rows, columns))[:, 0]
    best, instance = covered[:, cells[placed, 0], cells[placed, 1]].max(0)
    labels[placed] = torch.where(best >= COVERED, instance + 1, 0)
    return labels
