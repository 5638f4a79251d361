"""Losses of the training; which are used, and their weights, are ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from common import alone_codes, attribute_codes, centres, patch_labels
from model import GRID, IMAGE_SIZE, NUM_COLOURS, NUM_SHAPES, encode_points
from torch import Tensor
from torch.nn import functional


def mask_loss(logits: Tensor, targets: Tensor, positive: float = 1.0) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy plus dice of logits [n, h, w] against soft targets [n, h, w] in 0..1; and the mean IoU.

    `positive`: weight of target pixels in the cross-entropy; above 1 it leads a new model off empty masks.
    """
    logits = logits.float()
    entropy = functional.binary_cross_entropy_with_logits(logits, targets, pos_weight=torch.tensor(positive))
    shown = logits.sigmoid()
    overlap = (shown * targets).sum((1, 2))
    dice = 1 - (2 * overlap + 1) / (shown.sum((1, 2)) + targets.sum((1, 2)) + 1)
    with torch.no_grad():
        found, wanted = logits > 0, targets > 0.5
        iou = (found & wanted).sum((1, 2)) / ((found | wanted).sum((1, 2)) + 1e-5)
    return 8 * entropy + dice.mean(), iou.mean()


def half_size(masks: Tensor) -> Tensor:
    """Soft targets [n, 128, 128] of bool masks [n, 256, 256]."""
    return functional.avg_pool2d(masks.float()[:, None], 2)[:, 0]


def tower_loss(
    outputs: tuple[list[Tensor], Tensor], labels: np.ndarray, scenes: Sequence[Sequence[Any]]
) -> tuple[Tensor, dict[str, float]]:
    """Dense losses on the tower's features and one on its CLS output.

    Per patch: shape, colour and size of the object that covers it most, whether it shares its colour, and its shape,
    with no other object, the offset to its centre and SAM's encoding of that centre; per image: which shapes and
    colours occur. `labels`: uint8 [B, 256, 256].
    """
    (shape, colour, size, offset, alone, centre), image = outputs
    best, _ = patch_labels(labels)
    codes = np.stack([attribute_codes(objects) for objects in scenes])
    wanted = torch.from_numpy(np.take_along_axis(codes, best[:, :, None], axis=1))
    patch = IMAGE_SIZE // GRID
    grid = np.stack(np.meshgrid(np.arange(GRID), np.arange(GRID)), -1).reshape(1, -1, 2) * patch + patch / 2
    points = np.take_along_axis(np.stack([centres(objects) for objects in scenes]), best[:, :, None], axis=1)
    offsets = torch.from_numpy(((points - grid) / patch).astype(np.float32))
    inside = torch.from_numpy(best > 0)
    weight = torch.where(inside, 1.0, 0.15)
    loss = torch.zeros(())
    report = {}
    for name, logits, code in (("shape", shape, 0), ("colour", colour, 1), ("size", size, 2)):
        entropy = functional.cross_entropy(logits.float().flatten(0, 1), wanted[..., code].flatten(), reduction="none")
        loss = loss + (entropy * weight.flatten()).sum() / weight.sum()
        right = logits.argmax(-1) == wanted[..., code]
        report[name] = float(right[inside].float().mean())
    wanted_alone = np.take_along_axis(np.stack([alone_codes(objects) for objects in scenes]), best[:, :, None], axis=1)
    loss = loss + 2 * functional.binary_cross_entropy_with_logits(
        alone.float()[inside], torch.from_numpy(wanted_alone)[inside]
    )
    report["alone"] = _recall(alone.detach().float()[inside] > 0, torch.from_numpy(wanted_alone)[inside] > 0)
    loss = loss + functional.smooth_l1_loss(offset.float()[inside], offsets[inside])
    report["offset"] = float((offset.detach().float()[inside] - offsets[inside]).abs().mean())
    loss = loss + 4 * functional.mse_loss(centre.float()[inside], encode_points(torch.from_numpy(points))[inside])
    present = torch.zeros(len(scenes), NUM_SHAPES + NUM_COLOURS)
    for row, code in enumerate(codes):
        real = code[code[:, 0] < NUM_SHAPES]
        present[row, real[:, 0]] = 1
        present[row, NUM_SHAPES + real[:, 1]] = 1
    loss = loss + 0.5 * functional.binary_cross_entropy_with_logits(image.float(), present)
    return loss, report


def _recall(found: Tensor, wanted: Tensor) -> float:
    """Mean of the shares of hits among positives and among negatives: 0.5 by guessing."""
    return float((found[wanted].float().mean() + (~found[~wanted]).float().mean()) / 2)
