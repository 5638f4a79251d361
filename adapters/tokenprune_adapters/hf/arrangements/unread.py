"""Image tokens of models whose towers are not read: places alone, told by what the model returns and by its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune_adapters.hf.arrangements.grid_cells import Cells
from tokenprune_adapters.hf.arrangements.square_crops import Arrangement

SIZES = ("image_sizes", "spatial_shapes", "target_sizes")


class Unread(Arrangement):
    """Images in row-major order, as the inputs tell their sizes; without sizes, square ones.

    Their towers have windows, convolutions or several parts, so that no patches can be assigned to a token.
    """

    reads_tower: ClassVar[bool] = False

    def placed(self, returned: Sequence[Tensor]) -> Cells:
        """Images and grid cells of the image tokens, after the call.

        Args:
            returned: the model's image features, [images, tokens, width], or [tokens, width] for each image.
        """
        counts = [
            count for part in returned for count in ([len(part)] if part.dim() == 2 else [part.shape[1]] * len(part))
        ]
        sizes = self._sizes()
        if sizes is None or len(sizes) != len(counts):
            return Cells.joined([self.alone(count) for count in counts])
        return Cells.joined([_in_proportion(count, *size) for count, size in zip(counts, sizes, strict=True)])

    @classmethod
    def alone(cls, count: int) -> Cells:
        """One image of `count` tokens, of which no size is known."""
        return Cells.square(count)

    def _sizes(self) -> list[tuple[int, int]] | None:
        """Height and width of each image, in pixels or patches."""
        grids = self.inputs.get("image_grid_thw")
        if grids is not None:
            return [(height, width) for frames, height, width in grids.tolist() if frames == 1]
        sizes = next((self.inputs[name] for name in SIZES if self.inputs.get(name) is not None), None)
        return None if sizes is None else [tuple(size) for size in torch.as_tensor(sizes).tolist()]


class Placed(Unread):
    """Gemma 4 unified: patches whose columns and rows are inputs, -1 for padding. Each frame of a video is an image."""

    def placed(self, returned: Sequence[Tensor]) -> Cells:
        """See `Unread.placed`."""
        return Cells.joined([Cells.at(grid) for grid in self._patches()])

    def _patches(self) -> list[Tensor]:
        """Rows and columns of the patches of each image or frame, int64 [P, 2]."""
        places = self.inputs.get("image_position_ids", self.inputs.get("video_position_ids"))
        assert places is not None
        return [image[(image != -1).all(-1)].flip(-1).cpu().long() for image in places]


class PooledPlaces(Placed):
    """Gemma 4: as `Placed`, k × k patches for each token."""

    def placed(self, returned: Sequence[Tensor]) -> Cells:
        """See `Unread.placed`."""
        k = self.base.config.vision_config.pooling_kernel_size
        sizes = [(int(grid[:, 0].max()) + 1, int(grid[:, 1].max()) + 1) for grid in self._patches()]
        return Cells.joined([Cells.lines(rows // k, columns // k) for rows, columns in sizes])


class CropsFirst(Unread):
    """Step 3.7: crops of an image, then the whole one; two convolutions make a token of about 4 × 4 patches."""

    def placed(self, returned: Sequence[Tensor]) -> Cells:
        """See `Unread.placed`; the features of an image are returned together."""
        given = self.inputs.get("num_local_patches")
        counts = [0] * len(returned) if given is None else torch.as_tensor(given).tolist()
        crop, whole = (self._grid(self.inputs.get(name)) for name in ("pixel_values_local", "pixel_values"))
        return Cells.joined([Cells.lines(*size) for count in counts for size in [*[crop] * count, whole]])

    def _grid(self, pixels: Tensor | None) -> tuple[int, int]:
        patch = self.base.config.vision_config.patch_size
        rows, columns = (0, 0) if pixels is None else (side // patch for side in pixels.shape[-2:])
        return -(-rows // 4), -(-columns // 4)


class Resampled(Unread):
    """A fixed number of learned queries, each of which sees the whole image: no grid."""

    @classmethod
    def alone(cls, count: int) -> Cells:
        """One image without a grid."""
        return Cells.at(torch.full((count, 2), -1))


class ResampledRows(Resampled):
    """Idefics2: as `Resampled`, where the images of a batch row are returned together."""

    def placed(self, returned: Sequence[Tensor]) -> Cells:
        """See `Unread.placed`."""
        latents = self.base.config.perceiver_config.resampler_n_latents
        return Cells.joined([self.alone(latents)] * (sum(map(len, returned)) // latents))


class Views(Resampled):
    """DeepSeek-OCR 2: queries for each tile of an image, then for the whole image, then a separator."""

    def placed(self, returned: Sequence[Tensor]) -> Cells:
        """See `Unread.placed`. Tiles are images of their own."""
        tiles = torch.as_tensor(self.inputs.get("num_local_patches", [0] * len(returned))).tolist()
        whole, tile = (self._queries(self.inputs.get(name)) for name in ("pixel_values", "pixel_values_local"))
        return Cells.joined([part for count in tiles for part in (*[tile] * count, whole, Cells.lone_separator())])

    def _queries(self, views: Tensor | None) -> Cells:
        tower, patch = self.base.vision_tower, self.base.config.vision_config.sam_config.patch_size
        rows, columns = (0, 0) if views is None else (-(-(side // patch) // 4) for side in views.shape[-2:])
        few, many = len(tower.query_768_resolution.weight), len(tower.query_1024_resolution.weight)
        return self.alone(few if rows * columns <= few else many)


class EndedLines(Unread):
    """Emu3: words of a visual vocabulary, and another word at the end of each line, which is a separator."""

    def placed(self, returned: Sequence[Tensor]) -> Cells:
        """See `Unread.placed`."""
        side = self.base.vqmodel.vision_spatial_factor
        sizes = [(height // side, width // side) for height, width in self._sizes() or ()]
        return Cells.joined([Cells.lines(*size, separated=True) for size in sizes])


def _in_proportion(count: int, height: int, width: int) -> Cells:
    """One image of `count` tokens, whose grid has the proportions of the image; without a grid if none fits."""
    scale = (height * width / count) ** 0.5
    rows, columns = round(height / scale), round(width / scale)
    return Cells.lines(rows, columns) if rows * columns == count else Resampled.alone(count)
