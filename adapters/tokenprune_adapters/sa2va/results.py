"""What Sa2VA takes in, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune_adapters.sa2va.sam2 import Sam2Features
from tokenprune_adapters.sa2va.tower import TilesRun
from tokenprune_adapters.segmentation.sam.masks import MaskSizes


@dataclass(frozen=True)
class PreparedImage:
    """The inputs of the tower and of SAM 2 for one picture.

    Args:
        tiles: float32 [tiles, 3, side, side], see `tiles.cut`.
        sam_pixels: float32 [1, 3, square, square], the whole picture, stretched.
        sizes: how masks get back to the picture; nothing is padded.
        columns, rows: of tiles, without the whole picture behind them.
    """

    tiles: Tensor
    sam_pixels: Tensor
    sizes: MaskSizes
    columns: int
    rows: int

    def cells(self, side: int) -> tuple[Tensor, Tensor]:
        """(row, column) of each image token, int64 [N, 2], and the number of its image, int64 [N].

        Image 0 are the tiles, which have one grid; image 1 is the whole picture behind several of them.

        Args:
            side: image tokens of a tile, each way.
        """
        inside = torch.cartesian_prod(torch.arange(side), torch.arange(side)).reshape(-1, 2)
        corners = torch.cartesian_prod(torch.arange(self.rows), torch.arange(self.columns)).reshape(-1, 1, 2) * side
        grid, image = (corners + inside).flatten(0, 1), torch.zeros(len(corners) * side * side, dtype=torch.int64)
        if len(self.tiles) == len(corners):
            return grid, image
        return torch.cat((grid, inside)), torch.cat((image, torch.ones(side * side, dtype=torch.int64)))


@dataclass(frozen=True)
class EncodedImage:
    """A picture after both towers. N image tokens of all tiles, H decoder width.

    Args:
        prepared: what went in.
        tower: the tower's run.
        image_embeddings: [1, N, H], after the projector.
        sam_features: SAM 2's, B = 1.
        image_valid: None = no image token is masked.
    """

    prepared: PreparedImage
    tower: TilesRun
    image_embeddings: Tensor
    sam_features: Sam2Features
    image_valid: Tensor | None = None
