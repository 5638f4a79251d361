"""Single panels of overlay pictures, as RGB arrays: an image with a mask, the tokens of a stage, a heat map."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tokenprune.core.trace import StageTrace, Trace
from tokenprune.evaluation.coverage import Box, cells_to_pixels, token_map
from tokenprune.utils.masks import foreground, ignored

RGB = NDArray[np.float64]  # [H, W, 3], 0 … 1

# Okabe and Ito's palette, which colour-blind readers can distinguish.
BLUE, ORANGE, VERMILION, GREEN = (0.0, 0.447, 0.698), (0.902, 0.624, 0.0), (0.835, 0.369, 0.0), (0.0, 0.62, 0.451)
PARKED = (0.25, 0.41, 0.49)  # a mid-grey place under the blue tint, for legends


def plain(image: NDArray[np.uint8]) -> RGB:
    """The image itself."""
    return np.asarray(image, dtype=np.float64) / 255


def with_mask(image: NDArray[np.uint8], mask: NDArray[Any], colour: tuple[float, float, float] = VERMILION) -> RGB:
    """The image greyed down, the mask in colour with a white rim, visible on any background."""
    inside = foreground(mask)
    base = grey(image) * 0.6 + 0.2
    panel = np.where(inside[..., None], 0.35 * plain(image) + 0.65 * np.asarray(colour), base)
    panel[_rim(inside)] = 1.0
    return panel


def with_target(image: NDArray[np.uint8], target: NDArray[Any]) -> RGB:
    """As `with_mask` in green; ignored pixels in orange."""
    panel = with_mask(image, target, GREEN)
    void = ignored(target)[..., None]
    return np.where(void, 0.5 * panel + 0.5 * np.asarray(ORANGE), panel)


def with_tokens(image: NDArray[np.uint8], trace: Trace, stage: StageTrace | None, row: int, box: Box) -> RGB:
    """The image at the places of active tokens; parked places tinted blue, dropped ones dark."""
    active = trace.exists if stage is None else stage.places()
    height, width = image.shape[:2]
    lit = cells_to_pixels(token_map(active[row].float(), trace, row) == 1.0, height, width, box)
    panel = np.where(lit[..., None], plain(image), 0.18 * grey(image))
    if stage is not None:
        parked = cells_to_pixels(token_map(stage.parked[row].float(), trace, row) == 1.0, height, width, box) & ~lit
        panel = np.where(parked[..., None], 0.45 * grey(image) + 0.35 * np.asarray(BLUE), panel)
    return panel


def merged_places(trace: Trace, stage: StageTrace, row: int, box: Box) -> NDArray[np.float64]:
    """Centres (x, y) in pixels of the places of merged tokens: float64 [n, 2]."""
    if stage.lineage is None:
        return np.zeros((0, 2))
    carries = (stage.lineage[row].sum(-1) > 1) & stage.active[row] & (stage.origin[row] >= 0)
    cells = trace.layout.gather_slots(trace.layout.grid)[row][stage.origin[row][carries]].cpu().numpy()
    cells = cells[(cells >= 0).all(-1)]
    rows, columns = token_map(trace.exists[row].float(), trace, row).shape
    top, left, bottom, right = box
    y = top + (cells[:, 0] + 0.5) * (bottom - top) / max(rows, 1)
    x = left + (cells[:, 1] + 0.5) * (right - left) / max(columns, 1)
    return np.stack((x, y), -1)


def score_map(trace: Trace, scores: Tensor, row: int) -> NDArray[np.float32]:
    """The scores of a stage, on the grid: float32 [rows, columns], NaN for tokens without a score."""
    values = token_map(scores[row], trace, row)
    return np.where(np.isfinite(values), values, np.float32("nan"))


def grey(image: NDArray[np.uint8]) -> RGB:
    """Luminance (Rec. 601) in three equal channels."""
    light = plain(image) @ np.array([0.299, 0.587, 0.114])
    return np.repeat(light[..., None], 3, -1)


def _rim(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return np.asarray(mask & ~inner)
