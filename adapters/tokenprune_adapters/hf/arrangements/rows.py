"""Image tokens of towers that take images of any size in one sequence, patch by patch in row-major order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenprune_adapters.hf.arrangements.grid_cells import Cells
from tokenprune_adapters.hf.arrangements.square_crops import Arrangement


def blocks(patches: Tensor, sizes: Sequence[tuple[int, int]], sides: Sequence[int]) -> Tensor:
    """[P, D] to [tokens, k · k, D]: the patches of each token; rows and columns that fill none are left out.

    Args:
        patches: of all images, each in row-major order.
        sizes: rows and columns of each image.
        sides: k of each image.
    """
    found = []
    parts = torch.split(patches, [rows * columns for rows, columns in sizes])
    for part, (rows, columns), side in zip(parts, sizes, sides, strict=True):
        grid = part.view(rows, columns, -1)[: rows // side * side, : columns // side * side]
        block = grid.reshape(rows // side, side, columns // side, side, -1).transpose(1, 2)
        found.append(block.reshape(-1, side**2, patches.shape[-1]))
    return torch.cat(found)


class PackedRows(Arrangement):
    """Pixtral's tower: k × k patches become a token, and rows and columns that fill none are left out; here k = 1."""

    def cells(self, tokens: int, crops: int) -> Cells:
        """Text may stand between the lines of an image, which is one image all the same."""
        return Cells.joined([Cells.lines(rows // self.side, cols // self.side) for rows, cols in self._sizes()])

    def pool(self, values: Sequence[Tensor], tokens: int) -> Tensor:
        """Mean over the patches of a token."""
        return self._blocks(values).mean(1)

    def features(self, given: Sequence[Tensor], tokens: int) -> Tensor:
        """The patches of a token concatenated, in row-major order: [tokens, k · k · C]."""
        return self._blocks(given).flatten(1)

    @property
    def side(self) -> int:
        """Patches of a token, each way."""
        return 1

    def _sizes(self) -> list[tuple[int, int]]:
        """Rows and columns of the patches of each image."""
        patch, sizes = self.base.config.vision_config.patch_size, self.inputs.get("image_sizes")
        if sizes is None:
            pixels: Tensor = self.inputs["pixel_values"]
            return [(pixels.shape[-2] // patch, pixels.shape[-1] // patch)] * len(pixels)
        return [(height // patch, width // patch) for height, width in torch.as_tensor(sizes).tolist()]

    def _blocks(self, values: Sequence[Tensor]) -> Tensor:
        """[tokens, k · k, D]: the patches of each token."""
        sizes = self._sizes()
        return blocks(torch.cat([value.flatten(0, -2) for value in values]), sizes, [self.side] * len(sizes))


class Unfolded(PackedRows):
    """Mistral 3: the projector makes a token of k × k patches."""

    @property
    def side(self) -> int:
        """See `PackedRows.side`."""
        return int(self.base.config.spatial_merge_size)

    @classmethod
    def project(cls, projector: Any, features: Tensor) -> Tensor:
        """Project with the projector, which is given one image with the tokens side by side."""
        side, patch = projector.patch_merger.spatial_merge_size, projector.patch_merger.patch_size
        batch, count, _ = features.shape
        wide = features.reshape(batch * count, side, side, -1).transpose(0, 1).flatten(0, 2)
        projected: Tensor = projector(wide, [(side * patch, batch * count * side * patch)])
        return projected.view(batch, count, -1)
