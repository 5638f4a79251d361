"""PixelLM's vision tower: CLIP at a larger image size, whose padded patches are hidden, and its coarser token grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tokenprune.core.reads import TowerStates
from tokenprune_adapters.clip import tower_reads
from tokenprune_adapters.llava.vision import TowerRun, run_tower
from tokenprune_adapters.segmentation.sam.masks import PIXEL_MEAN, PIXEL_STD, MaskSizes

GRID = 16  # rows and columns of image tokens in the decoder, whatever the image size
EARLY_LAYER = -11  # hidden states whose features draw the finer masks


def resize_tower(tower: nn.Module, square: int) -> None:
    """Make a CLIP vision model take images of `square` pixels, the way that PixelLM was trained. In place.

    CLIP's table of positions has [CLS] first; PixelLM's authors resize it (bilinear) as if [CLS] were last, and the
    result is used as if it were first again. The model was trained so, and so it has to stay.

    Args:
        tower: the vision model, with float32 weights (the table is not to be resized in reduced precision).
        square: side of the new input, in pixels.
    """
    embeddings: Any = next(module for module in tower.modules() if type(module).__name__ == "CLIPVisionEmbeddings")
    side = square // embeddings.patch_size
    table = resized_positions(embeddings.position_embedding.weight.detach(), side)
    embeddings.image_size = square
    embeddings.num_patches, embeddings.num_positions = side * side, len(table)
    embeddings.position_embedding = nn.Embedding(len(table), table.shape[1], _weight=table)
    embeddings.register_buffer("position_ids", torch.arange(len(table)).expand(1, -1), persistent=False)


def resized_positions(table: Tensor, side: int) -> Tensor:
    """The table of positions [1 + side², C] of a larger grid, from a table [1 + n², C]; see `resize_tower`."""
    before = round((len(table) - 1) ** 0.5)
    grid = table[:-1].T.reshape(1, -1, before, before)
    grid = functional.interpolate(grid, (side, side), mode="bilinear", align_corners=False)
    return torch.cat((grid[0].flatten(1).T, table[-1:])).contiguous()


@dataclass(frozen=True)
class Visible:
    """Which patches of the tower, and which cells of the decoder's grid, show the image and not its padding.

    Args:
        patches: bool [side, side].
        cells: bool [GRID, GRID].
    """

    patches: Tensor
    cells: Tensor

    @classmethod
    def of(cls, sizes: MaskSizes, side: int) -> Visible:
        """Nearest-neighbour: what the top left pixel of a patch, and the top left patch of a cell, is."""
        pixels = torch.zeros(1, 1, sizes.square, sizes.square)
        pixels[..., : sizes.resized[0], : sizes.resized[1]] = 1
        patches = functional.interpolate(pixels, (side, side), mode="nearest")
        cells = functional.interpolate(patches, (GRID, GRID), mode="nearest")
        return cls(patches[0, 0].bool(), cells[0, 0].bool())

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of visible cells; they are the top left part of the grid."""
        return int(self.cells[:, 0].sum()), int(self.cells[0].sum())


def grid_box(sizes: MaskSizes, side: int) -> tuple[float, float, float, float]:
    """(top, left, bottom, right): what the visible cells divide, in pixels of the image; it may reach beyond its edges.

    Args:
        sizes: of the image.
        side: rows and columns of patches in the tower.
    """
    rows, columns = Visible.of(sizes, side).shape
    cell = sizes.square / GRID
    height, width = (full / small for full, small in zip(sizes.original, sizes.resized, strict=True))
    return 0.0, 0.0, rows * cell * height, columns * cell * width


@dataclass(frozen=True)
class PixelTowerRun:
    """One image in PixelLM's tower. Everything that strategies read is that of the n visible cells alone.

    Features are resized to the grid as the model does it (bilinear, where padded patches count too). Everything else
    is the mean over the visible patches of a cell (ours).

    Args:
        patches: the run over all patches.
        visible: which of them are no padding.
        grid_features: [1, GRID², C], what the projector reads, padded cells included.
    """

    patches: TowerRun
    visible: Visible
    grid_features: Tensor

    @property
    def layers(self) -> int:
        """Number of the tower's layers."""
        return self.patches.layers

    @property
    def features(self) -> Tensor:
        """[1, n, C]: of the visible cells."""
        return self.grid_features[:, self.visible.cells.flatten().to(self.grid_features.device)]

    @property
    def tower(self) -> nn.Module:
        """The CLIP vision model."""
        return self.patches.tower

    @property
    def cls_features(self) -> Tensor:
        """[1, 1, C]: the [CLS] row of the states that the features are taken from."""
        return self.patches.cls_features

    def each_patch(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """[1, n, D]: a function from patch rows to float32 [1, side², D], applied to all patches."""
        return self._pooled(function(self.patches.features))

    @property
    def early_features(self) -> Tensor:
        """[1, side², C]: of all patches, from the layer of the finer masks, without [CLS]."""
        return self.patches.states[EARLY_LAYER][:, 1:]

    def cls_attention(self, layer: int, heads: str = "mean") -> Tensor:
        """float32 [1, n]: attention of [CLS], see `tokenprune.core.reads.ClsAttention`; padded patches get none."""
        weights = tower_reads.cls_attention(self.patches.seen(layer), heads)
        padded = ~self.visible.patches.flatten().to(weights.device)
        # The full-width softmax knows no mask: what padded patches took goes to the others.
        weights = weights.masked_fill(padded, 0) / (1 - weights[:, padded].sum(1, keepdim=True))
        return self._pooled(weights[..., None])[..., 0]

    def received_attention(self, layer: int) -> Tensor:
        """float32 [1, n]: mean attention received from [CLS] and the visible patches."""
        seen = self.patches.seen(layer)
        shown = functional.pad(self.visible.patches.flatten().to(seen.query.device), (1, 0), value=True)
        mask = None if seen.mask is None else seen.mask[:, :, shown]
        received = tower_reads.received_attention(replace(seen, query=seen.query[:, :, shown], mask=mask))
        return self._pooled(received[:, 1:, None])[..., 0]

    def cls_query(self, layer: int) -> Tensor:
        """float32 [1, 1, C]: the query of [CLS], heads concatenated."""
        return self.patches.cls_query(layer)

    def keys(self, layer: int, heads: str = "joint") -> Tensor:
        """float32 [1, n, C]: keys, see `tokenprune.core.reads.TowerKeys`."""
        return self._pooled(self.patches.keys(layer, heads))

    def values(self, layer: int) -> Tensor:
        """float32 [1, n, C]: values, heads concatenated."""
        return self._pooled(self.patches.values(layer))

    def mean_state(self, read: TowerStates) -> Tensor:
        """float32 [1, n, C]: the mean state, see `tokenprune.core.reads.TowerStates`."""
        return self._pooled(self.patches.mean_state(read))

    def _pooled(self, values: Tensor) -> Tensor:
        """[1, side², C] -> [1, n, C]: the mean over the visible patches of every visible cell."""
        shown = self.visible.patches.to(values)
        grid = values[0].T.reshape(1, values.shape[-1], *shown.shape) * shown
        share = functional.adaptive_avg_pool2d(shown[None, None], GRID)
        cells = self.visible.cells.flatten().to(values.device)
        pooled = functional.adaptive_avg_pool2d(grid, GRID) / share.clamp(min=1e-6)
        return pooled.flatten(2).transpose(1, 2)[:, cells]


def run_pixel_tower(
    tower: nn.Module, pixels: Tensor, sizes: Sequence[MaskSizes], select_layer: int = -2
) -> list[PixelTowerRun]:
    """Run the tower once on B images, the padded patches of each hidden as keys ([CLS] never is).

    Args:
        tower: the resized CLIP vision model.
        pixels: [B, 3, square, square], zero-padded on the right and at the bottom.
        sizes: of each image; `square` is the same for all.
        select_layer: index into the hidden states of what the projector and the coarser masks read.
    """
    weight = next(tower.parameters())
    config: Any = tower.config
    side = sizes[0].square // config.patch_size
    visible = [Visible.of(size, side) for size in sizes]
    shown = torch.stack([functional.pad(one.patches.flatten(), (1, 0), value=True) for one in visible])
    padded = ~shown.all(1)
    mask = None
    if bool(padded.any()):
        hidden = ~shown.to(weight.device)[:, None, None]
        mask = torch.zeros(hidden.shape, dtype=weight.dtype, device=weight.device)
        mask = mask.masked_fill(hidden, torch.finfo(weight.dtype).min).expand(-1, -1, shown.shape[1], -1)
    run = run_tower(tower, pixels, select_layer, mask)
    grid = run.features.transpose(1, 2).reshape(len(sizes), -1, side, side)
    grid = functional.interpolate(grid.float(), (GRID, GRID), mode="bilinear", align_corners=False).to(run.features)
    cells = torch.split(grid.flatten(2).transpose(1, 2), 1)
    runs = [part if hides else replace(part, mask=None) for part, hides in zip(run.each_image(), padded, strict=True)]
    return [PixelTowerRun(*parts) for parts in zip(runs, visible, cells, strict=True)]


def picture(pixels: Tensor, visible: Visible) -> Tensor:
    """The picture that the visible cells divide, uint8 [1, h, w, 3], from tower pixels [1, 3, square, square].

    Padding inside the last row or column of cells has the mean colour.
    """
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    rows, columns = visible.shape
    cell = pixels.shape[-1] // GRID
    values: Tensor = (pixels.float().cpu() * std + mean)[..., : rows * cell, : columns * cell]
    return values.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
