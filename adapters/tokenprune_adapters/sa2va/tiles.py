"""InternVL's pictures: tiles of one size, and behind several of them the whole picture once more."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MAX_TILES = 12  # the authors' own, whatever config.json says


def tile_grid(width: int, height: int, side: int, most: int = MAX_TILES) -> tuple[int, int]:
    """(columns, rows) of tiles that a picture is stretched to.

    Of all grids of at most `most` tiles, the one whose aspect ratio is nearest. Of several that are as near, the
    largest that the picture fills more than half, in pixels.

    Args:
        width, height: of the picture.
        side: of a tile, in pixels.
        most: largest number of tiles.
    """
    grids = [(columns, rows) for columns in range(1, most + 1) for rows in range(1, most // columns + 1)]
    grids.sort(key=lambda grid: grid[0] * grid[1])
    wanted, best, nearest = width / height, (1, 1), float("inf")
    for columns, rows in grids:
        distance = abs(wanted - columns / rows)
        if distance < nearest:
            nearest, best = distance, (columns, rows)
        elif distance == nearest and width * height > 0.5 * side * side * columns * rows:
            best = (columns, rows)
    return best


def cut(image: Image.Image, side: int, columns: int, rows: int) -> Tensor:
    """The tower's input of an RGB picture: float32 [tiles, 3, side, side], tiles row by row, the whole picture last.

    A picture of a single tile is not repeated. Resized with PIL (bicubic) and normalised as ImageNet.

    Args:
        image: the picture.
        side: of a tile, in pixels.
        columns, rows: of tiles, see `tile_grid`.
    """
    stretched = values(image, columns * side, rows * side)
    tiles = stretched.reshape(3, rows, side, columns, side).permute(1, 3, 0, 2, 4).reshape(-1, 3, side, side)
    return tiles if len(tiles) == 1 else torch.cat((tiles, values(image, side, side)[None]))


def values(image: Image.Image, width: int, height: int) -> Tensor:
    """A picture stretched to a size (PIL, bicubic) and normalised: float32 [3, height, width]."""
    resized = np.array(image.resize((width, height), Image.Resampling.BICUBIC))
    pixels = torch.from_numpy(resized).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (MEAN, STD))
    return (pixels - mean) / std
