"""Instance masks for CSP's `seg_first`, and the instance of each image token."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenprune.errors import InputError, OptionError, PluginError, UnknownNameError
from tokenprune.plugins import registry
from tokenprune.plugins.attribution import blamed, brief
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
        PluginError: the segmenter failed; of an installed one it names the package.
        InputError: the function did not return masks of this image.
    """
    name = segmenter if isinstance(segmenter, str) else getattr(segmenter, "__name__", repr(segmenter))
    installed = _installed(segmenter) if isinstance(segmenter, str) else None
    if installed is not None:
        return _checked(name, installed.call(image), image.shape[:2])
    run = partial(_by_checkpoint, _pipeline(segmenter)) if isinstance(segmenter, str) else segmenter
    with blamed(lambda problem: PluginError(f"segmenter {name!r} failed with {problem}")):
        found = run(image)
    return _checked(name, found, image.shape[:2])


def _checked(name: str, found: Any, size: tuple[int, int]) -> Tensor:
    """Masks of a function as bool [n, H, W] in the host's memory. Raises InputError if they are none."""
    try:
        masks = torch.as_tensor(found).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        masks = None
    if masks is None or masks.dim() != 3 or masks.shape[1:] != size:
        kind = type(found).__name__ if masks is None else f"masks of shape {list(masks.shape)}"
        raise InputError(f"segmenter {name!r}: found {kind}, expected masks [n, {size[0]}, {size[1]}] like the image")
    if masks.dtype == torch.bool:
        return masks
    if masks.is_floating_point() or masks.is_complex():  # scores: where an instance ends is not ours to choose
        raise InputError(f"segmenter {name!r}: found masks of {masks.dtype}, expected bool; return scores > 0.5, say")
    values = [value for value in torch.unique(masks).tolist() if value]
    if values not in ([], [1], [255]):
        raise InputError(
            f"segmenter {name!r}: found masks of {masks.dtype} with the values {values[:3]}, expected bool [n, H, W]; "
            "of a map of labels return [labels == label for each label]"
        )
    return masks.bool()


def _installed(name: str) -> Entry | None:
    try:
        return registry.get("segmenters", name)
    except UnknownNameError:
        return None


def _by_checkpoint(pipeline: Callable[[Any], Any], image: Any) -> Tensor:
    from PIL import Image

    found = pipeline(Image.fromarray(image))
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
            f"image segmentation ({brief(error)}); pass an installed segmenter, the name or folder of "
            "such a checkpoint, or a function"
        ) from error


def instance_labels(masks: Tensor, cells: Tensor, size: tuple[int, int] | None) -> Tensor:
    """The instance of each token, int64 [n]; the background, 0, counts as an instance (ours).

    A token belongs to the mask that covers most of its cell, if it covers at least half of it (ours).

    Args:
        masks: bool [instances, H, W]; they may overlap, be empty, or cover nothing.
        cells: int64 [n, 2], (row, column) of each token, −1 if it has none (background).
        size: rows and columns that divide the image; None if it has no cells.
    """
    placed = (cells >= 0).all(1)
    labels = torch.zeros(len(cells), dtype=torch.int64)
    if not len(masks) or size is None:
        return labels
    covered = torch.nn.functional.adaptive_avg_pool2d(masks[:, None].float(), size)[:, 0]
    best, instance = covered[:, cells[placed, 0], cells[placed, 1]].max(0)
    labels[placed] = torch.where(best >= COVERED, instance + 1, 0)
    return labels
