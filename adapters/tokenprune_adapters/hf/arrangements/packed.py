"""How patches become image tokens in models of transformers whose tower takes images of any size as one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune_adapters.hf.arrangements.grid_cells import Cells
from tokenprune_adapters.hf.arrangements.rows import blocks
from tokenprune_adapters.hf.arrangements.square_crops import Arrangement


class Merged(Arrangement):
    """Qwen2-VL: images of any size in one packed sequence; m × m consecutive patches become a token."""

    def cells(self, tokens: int, crops: int) -> Cells:
        """Each frame of a video is an image."""
        return Cells.joined([Cells.lines(rows, columns) for rows, columns in self._frames()])

    def pool(self, values: Sequence[Tensor], tokens: int) -> Tensor:
        """Mean over the patches of a token."""
        return self._in_order(self._by_token(torch.cat([value.flatten(0, 1) for value in values]), tokens).mean(1))

    def features(self, given: Sequence[Tensor], tokens: int) -> Tensor:
        """The patches of a token concatenated: [tokens, m · m · C]."""
        return self._in_order(self._by_token(torch.cat([part.flatten(0, -2) for part in given]), tokens).flatten(1))

    def _by_token(self, patches: Tensor, tokens: int) -> Tensor:
        """[patches, C] to [tokens, m · m, C]."""
        return patches.reshape(tokens, -1, patches.shape[-1])

    def _grids(self) -> list[list[int]]:
        """Time, height and width in patches of each image or video."""
        grids = self.inputs.get("image_grid_thw", self.inputs.get("video_grid_thw"))
        assert grids is not None
        found: list[list[int]] = grids.tolist()
        return found

    def _merges(self) -> list[int]:
        """m of each image or video."""
        return [self.base.config.vision_config.spatial_merge_size] * len(self._grids())

    def _frames(self) -> list[tuple[int, int]]:
        """Rows and columns of tokens of each frame."""
        sizes = zip(self._grids(), self._merges(), strict=True)
        return [(h // m, w // m) for (t, h, w), m in sizes for _ in range(t)]

    def _in_order(self, tokens: Tensor) -> Tensor:
        return tokens

    @classmethod
    def project(cls, projector: Any, features: Tensor) -> Tensor:
        """Project with the merger, whose input is m · m patches for each token."""
        batch, count, width = features.shape
        norm = next(module for module in projector.modules() if getattr(module, "weight", features).dim() == 1)
        projected: Tensor = projector(features.reshape(batch * count * width // len(norm.weight), -1))
        return projected.view(batch, count, -1)


class Windowed(Merged):
    """Qwen2.5-VL: the tower orders the tokens by windows, and restores their order after the merger."""

    def _in_order(self, tokens: Tensor) -> Tensor:
        vision = self.base.config.vision_config
        size = vision.window_size // vision.spatial_merge_size // vision.patch_size
        return _from_windows(tokens, self._frames(), size)


class RowMajor(Merged):
    """PaddleOCR-VL: the tower keeps an image's patches in row-major order, and the projector merges them."""

    def _by_token(self, patches: Tensor, tokens: int) -> Tensor:
        return blocks(patches, [(t * h, w) for t, h, w in self._grids()], self._merges())

    @classmethod
    def project(cls, projector: Any, features: Tensor) -> Tensor:
        """Each token as an image of m × m patches."""
        batch, count, _ = features.shape
        grid = torch.tensor([[batch * count, *projector.merge_kernel_size]], device=features.device)
        projected: Tensor = projector(features.reshape(-1, *projector.pre_norm.weight.shape), grid)
        return projected.view(batch, count, -1)


class MergedRows(RowMajor):
    """Kimi K2.5: patches in row-major order, of which the tower hands m × m for each token to the projector."""

    def features(self, given: Sequence[Tensor], tokens: int) -> Tensor:
        """The patches of a token concatenated: [tokens, m · m · C]."""
        return torch.cat(list(given)).reshape(tokens, -1)

    def _merges(self) -> list[int]:
        return [int(self.base.vision_tower.merge_kernel_size[0])] * len(self._grids())

    @classmethod
    def project(cls, projector: Any, features: Tensor) -> Tensor:
        """Project with the projector, whose input is [tokens, m · m, C]."""
        patches = features.reshape(features.shape[:2].numel(), -1, len(projector.pre_norm.weight))
        projected: Tensor = projector(patches)
        return projected.reshape(*features.shape[:2], -1)


class Bordered(RowMajor):
    """HunYuan-VL: as PaddleOCR-VL, with separators at the end of each row, and before and behind an image."""

    def cells(self, tokens: int, crops: int) -> Cells:
        """Each image with its separators."""
        border = Cells.lone_separator()
        images = [(border, Cells.lines(*size, separated=True), border) for size in self._frames()]
        return Cells.joined([part for image in images for part in image])

    def _in_order(self, tokens: Tensor) -> Tensor:
        """Separators get zeros."""
        separator = self.cells(0, 0).separator.to(tokens.device)
        return tokens.new_zeros(len(separator), tokens.shape[1]).masked_scatter_(~separator[:, None], tokens)

    @classmethod
    def project(cls, projector: Any, features: Tensor) -> Tensor:
        """The steps of the module, each token as an image of m × m patches."""
        batch, count, _ = features.shape
        m = projector.spatial_merge_size
        patches = projector.before_rms(features.reshape(batch * count, m * m, -1))
        squares = patches.transpose(1, 2).reshape(batch * count, -1, m, m)
        merged = projector.proj_out(projector.proj_act(projector.proj_conv(squares))).flatten(1)
        projected: Tensor = projector.after_rms(projector.mlp(merged))
        return projected.view(batch, count, -1)


class PairsOfFrames(Merged):
    """ERNIE 4.5 VL: the projector makes a token of m × m patches in two frames; an image stands for both of them."""

    def _by_token(self, patches: Tensor, tokens: int) -> Tensor:
        parts, start = [], 0
        for (t, h, w), m in zip(self._grids(), self._merges(), strict=True):
            frames = patches[start : start + t * h * w].reshape(t, -1, m * m, patches.shape[-1])
            parts.append(torch.cat((frames[::2], frames[1::2] if t > 1 else frames), 2).flatten(0, 1))
            start += t * h * w
        return torch.cat(parts)

    def _frames(self) -> list[tuple[int, int]]:
        sizes = zip(self._grids(), self._merges(), strict=True)
        return [(h // m, w // m) for (t, h, w), m in sizes for _ in range(-(-t // 2))]

    @classmethod
    def project(cls, projector: Any, features: Tensor) -> Tensor:
        """All tokens as one video of two frames, m patches wide."""
        batch, count, _ = features.shape
        m = projector.spatial_merge_size
        grid = torch.tensor([[2, batch * count * m, m]], device=features.device)
        frames = features.reshape(batch * count, 2, m * m, -1).transpose(0, 1)
        projected: Tensor = projector(frames.flatten(0, 2), grid)
        return projected.view(batch, count, -1)


class MergedInTower(Merged):
    """The projector takes a token, which the tower has made of m × m patches, in the order of the image."""

    def features(self, given: Sequence[Tensor], tokens: int) -> Tensor:
        """The projector's input: [tokens, C]."""
        return torch.cat(list(given))

    @classmethod
    def project(cls, projector: nn.Module, features: Tensor) -> Tensor:
        """[B, k, C] to [B, k, width], token by token."""
        projected: Tensor = projector(features)
        return projected


class WindowedInTower(MergedInTower, Windowed):
    """HyperCLOVA X Vision: the whole tower of Qwen2.5-VL, with its merger, before the projector."""


class Unshuffled(MergedInTower):
    """VideoLLaMA 3: the tower shrinks each image m × m at its end, with an m of its own."""

    def pool(self, values: Sequence[Tensor], tokens: int) -> Tensor:
        """Mean over the patches of a token."""
        patches = torch.cat([value.flatten(0, 1) for value in values])
        counts = [t * h * w for t, h, w in self._grids()]
        sizes = zip(torch.split(patches, counts), self._merges(), strict=True)
        return torch.cat([part.reshape(-1, m * m, part.shape[-1]).mean(1) for part, m in sizes])

    def _merges(self) -> list[int]:
        merges = self.inputs.get("image_merge_sizes", self.inputs.get("video_merge_sizes"))
        assert merges is not None
        found: list[int] = merges.tolist()
        return found


class MergedBehind(MergedInTower):
    """Muse: the tower orders single patches by windows, and merges them behind itself."""

    def pool(self, values: Sequence[Tensor], tokens: int) -> Tensor:
        """Mean over the patches of a token, which is m × m of them."""
        m, frames = int(self.base.vision_tower.merge_size), self._frames()
        sizes = [(m * rows, m * columns) for rows, columns in frames]
        side = self.base.vision_tower.config.pos_emb_height
        patches = _from_windows(torch.cat([value.flatten(0, 1) for value in values]), sizes, side)
        parts = torch.split(patches, [rows * columns for rows, columns in sizes])
        merged = [
            part.reshape(rows, m, columns, m, -1).mean((1, 3)).flatten(0, 1)
            for part, (rows, columns) in zip(parts, frames, strict=True)
        ]
        return torch.cat(merged)

    def _merges(self) -> list[int]:
        return [int(self.base.vision_tower.merge_size)] * len(self._grids())

    @classmethod
    def embed(cls, base: Any, projected: Tensor) -> Tensor:
        """Through what follows the projector."""
        embedded: Tensor = base.perception_emb_norm(base.vision_projection(projected))
        return embedded


def _from_windows(values: Tensor, frames: Sequence[tuple[int, int]], side: int) -> Tensor:
    """From the order of a tower that works in windows to row-major order, frame by frame.

    Args:
        values: [T, D].
        frames: rows and columns of each frame.
        side: of a window.
    """
    order, start = [], 0
    for rows, columns in frames:
        cells = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).reshape(-1, 2)
        window = (cells[:, 0] // side) * columns + cells[:, 1] // side
        order.append(window.argsort(stable=True) + start)
        start += rows * columns
    where = torch.cat(order).to(values.device)
    return torch.empty_like(values).index_copy_(0, where, values)
