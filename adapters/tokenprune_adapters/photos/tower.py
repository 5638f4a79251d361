"""EfficientNet-Lite0 (Tan and Le, arXiv 1905.11946; the "lite" form of 2020) as a tower of four feature levels."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import relu6

LEVELS = (24, 40, 112, 320)
"""Channels of the levels at strides 4, 8, 16 and 32."""
STRIDE = 32
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

# repeats, kernel, stride, expansion, channels in and out; the level that a group's output is, if any
_GROUPS = (
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
)
_EPS = 1e-3


class SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow pads: the odd pixel of a stride goes to the right and bottom.

    Batch norm is part of its weights, see `from_package`.
    """

    def __init__(self, reads: int, writes: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        total = kernel - stride
        even = total % 2 == 0
        super().__init__(reads, writes, kernel, stride, padding=total // 2 if even else 0, groups=groups)
        self.pad = None if even else (total // 2, total - total // 2) * 2

    def forward(self, input: Tensor) -> Tensor:
        """[B, reads, H, W] to [B, writes, H / stride, W / stride]; sides are multiples of the stride."""
        if self.kernel_size == (1, 1):  # over channels that lie together, a product of matrices
            rows = nn.functional.linear(input.permute(0, 2, 3, 1), self.weight[:, :, 0, 0], self.bias)
            return rows.permute(0, 3, 1, 2)
        return super().forward(input if self.pad is None else nn.functional.pad(input, self.pad))


class Block(nn.Module):
    """An inverted bottleneck without squeeze and excitation."""

    def __init__(self, kernel: int, stride: int, expansion: int, reads: int, writes: int) -> None:
        super().__init__()
        inner = reads * expansion
        self.expand = SameConv(reads, inner, 1) if expansion > 1 else None
        self.depthwise = SameConv(inner, inner, kernel, stride, groups=inner)
        self.project = SameConv(inner, writes, 1)
        self.skip = stride == 1 and reads == writes

    def forward(self, x: Tensor) -> Tensor:
        """[B, reads, h, w] to [B, writes, h / stride, w / stride]."""
        inner = x if self.expand is None else relu6(self.expand(x), inplace=True)
        out: Tensor = self.project(relu6(self.depthwise(inner), inplace=True))
        return x + out if self.skip else out


class LiteTower(nn.Module):
    """EfficientNet-Lite0 without its classifier: four levels of features of pictures of any size."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem = SameConv(3, 32, 3, 2)
        blocks: list[Block] = []
        ends = {}
        for repeats, kernel, stride, expansion, reads, writes in _GROUPS:
            for number in range(repeats):
                blocks.append(
                    Block(kernel, stride if not number else 1, expansion, writes if number else reads, writes)
                )
            ends[writes] = len(blocks) - 1
        self.blocks = nn.ModuleList(blocks)
        self._taken = [ends[channels] for channels in LEVELS]
        self.register_buffer("mean", torch.tensor(MEAN).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).reshape(3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """The levels, finest first: [B, LEVELS[i], H / s, W / s] with s = 4, 8, 16, 32.

        Args:
            pixels: [B, 3, H, W], RGB in 0..1, sides multiples of 32.
        """
        x = relu6(self.stem((pixels - self.mean) / self.std), inplace=True)
        levels = []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in self._taken:
                levels.append(x)
        return levels


def from_package(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `LiteTower` from that of the package `efficientnet-lite-pytorch`.

    Every batch norm is folded into the convolution before it; the classifier is left out.
    """
    inner = [("_expand_conv", "_bn0", "expand"), ("_depthwise_conv", "_bn1", "depthwise")]
    inner += [("_project_conv", "_bn2", "project")]
    blocks = sorted({name.split(".")[1] for name in state if name.startswith("_blocks.")})
    folded = [("_conv_stem", "_bn0", "stem")]
    folded += [
        (f"_blocks.{number}.{conv}", f"_blocks.{number}.{norm}", f"blocks.{number}.{part}")
        for number in blocks
        for conv, norm, part in inner
    ]
    taken = {}
    for conv, norm, part in folded:
        if f"{conv}.weight" not in state:  # the first block expands nothing
            continue
        scale = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + _EPS).sqrt()
        taken[f"{part}.weight"] = state[f"{conv}.weight"] * scale[:, None, None, None]
        taken[f"{part}.bias"] = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
    return taken
