"""The trained parts around the decoder: projector, read-out of a place from one state, point-prompted mask head."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from tokenprune_adapters.photos.tower import LEVELS, STRIDE

_ACROSS, _DOWN = 16, 8  # waves of the position code
CODE = 2 * (_ACROSS + _DOWN)
CELL = 24 + 4 * 40 + 4 * 112 + 320  # numbers that the projector reads for a cell


def position_code(height: int, width: int) -> Tensor:
    """The code of each cell's centre, float32 [height · width, CODE]: sines and cosines of half waves, row by row."""
    y = (torch.arange(height) + 0.5) / height
    x = (torch.arange(width) + 0.5) / width
    down = math.pi * torch.arange(1, _DOWN + 1) * y[:, None]
    across = math.pi * torch.arange(1, _ACROSS + 1) * x[:, None]
    rows = torch.cat([down.sin(), down.cos()], 1)[:, None].expand(height, width, -1)
    columns = torch.cat([across.sin(), across.cos()], 1)[None].expand(height, width, -1)
    return torch.cat([columns, rows], -1).flatten(0, 1)


class Standardise(nn.Module):
    """Each channel of each level to mean 0 and deviation 1; the numbers are taken from training pictures."""

    def __init__(self) -> None:
        super().__init__()
        for number, channels in enumerate(LEVELS):
            self.register_buffer(f"mean{number}", torch.zeros(channels))
            self.register_buffer(f"std{number}", torch.ones(channels))

    def measure(self, pictures: Sequence[Sequence[Tensor]]) -> None:
        """Take the numbers from the levels of pictures, as `LiteTower` gives them."""
        for number in range(len(LEVELS)):
            values = torch.cat([levels[number].transpose(0, 1).flatten(1) for levels in pictures], 1)
            self.get_buffer(f"mean{number}").copy_(values.mean(1))
            self.get_buffer(f"std{number}").copy_(values.std(1) + 1e-4)

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """The levels, standardised; same shapes."""
        return [
            (level - self.get_buffer(f"mean{n}")[:, None, None]) / self.get_buffer(f"std{n}")[:, None, None]
            for n, level in enumerate(levels)
        ]


def gather_cells(levels: Sequence[Tensor]) -> Tensor:
    """What the levels hold for each cell of 32 × 32 pixels: [B, CELL, h, w]; finer levels unfolded or pooled."""
    finest, fine, middle, coarse = levels
    return torch.cat(
        [
            functional.avg_pool2d(finest, STRIDE // 4),
            functional.pixel_unshuffle(functional.avg_pool2d(fine, 2), 2),
            functional.pixel_unshuffle(middle, 2),
            coarse,
        ],
        1,
    )


class Projector(nn.Module):
    """From a cell's numbers and its position to an image token: two linear layers, with the neighbours in between.

    Image tokens are normalised to the size of word embeddings: the decoder's layers add as little to what is much
    larger as if they were not there.

    Args:
        width: of the decoder.
        scale: deviation that image tokens begin with; that of word embeddings.
        dropout: of whole channels of the input, in training.
    """

    def __init__(self, width: int, scale: float = 0.1, dropout: float = 0.1) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(dropout)
        self.enter = nn.Conv2d(CELL, width, 1)
        self.around = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, width)
        self.position = nn.Linear(CODE, width, bias=False)
        self.gain = nn.Parameter(torch.tensor(scale))
        nn.init.zeros_(self.around.weight)
        with torch.no_grad():
            self.around.weight[:, 0, 1, 1] = 1
            self.leave.weight.mul_(3**0.5 * scale)
            self.position.weight.mul_(scale)

    def forward(self, cells: Tensor) -> Tensor:
        """[B, CELL, h, w] to image tokens [B, h · w, width], row by row."""
        x = functional.gelu(self.enter(self.dropout(cells)))
        x = self.norm(self.around(x).flatten(2).transpose(1, 2))
        code = position_code(*cells.shape[-2:]).to(x.device, self.position.weight.dtype)
        tokens: Tensor = functional.rms_norm(self.leave(x) + self.position(code), self.norm.normalized_shape)
        return self.gain * tokens


class ReadOut(nn.Module):
    """A place in the picture from the mask query's state alone: how likely each cell of a grid is.

    The state is compared with codes of places, never with features of the picture: whoever does not know where the
    answer is cannot find it here.
    """

    def __init__(self, width: int, hidden: int = 256, rank: int = 64, dropout: float = 0.1) -> None:
        super().__init__()
        self.state = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, rank)
        )
        self.place = nn.Sequential(nn.Linear(CODE, hidden), nn.GELU(), nn.Linear(hidden, rank))

    def forward(self, states: Tensor, height: int, width: int) -> Tensor:
        """Logits [n, height · width] of states [n, H]."""
        places: Tensor = self.place(position_code(height, width).to(states))
        logits: Tensor = self.state(states) @ places.T
        return logits


def best_points(logits: Tensor, height: int, width: int) -> Tensor:
    """Points [n, 2], (x, y) in 0..1: the mean place in the 3 × 3 cells around the likeliest one."""
    likely = logits.float().softmax(-1)
    best = likely.argmax(-1)
    row, column = best // width, best % width
    rows, columns = torch.arange(height, device=logits.device), torch.arange(width, device=logits.device)
    near = ((rows - row[:, None]).abs() <= 1)[:, :, None] & ((columns - column[:, None]).abs() <= 1)[:, None]
    weights = likely.reshape(-1, height, width) * near
    weights = weights / weights.sum((1, 2), keepdim=True)
    x = (weights.sum(1) * (columns + 0.5) / width).sum(-1)
    y = (weights.sum(2) * (rows + 0.5) / height).sum(-1)
    return torch.stack([x, y], -1)


class Mix(nn.Module):
    """A residual step of the mask head: neighbours at a distance, then channels."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.around = nn.Conv2d(channels, channels, 5, padding=2 * dilation, dilation=dilation, groups=channels)
        self.norm = nn.GroupNorm(1, channels)
        self.channels = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 1), nn.GELU(), nn.Conv2d(2 * channels, channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        out: Tensor = x + self.channels(self.norm(self.around(x)))
        return out


class MaskHead(nn.Module):
    """The thing at a point: from the tower's levels and one point to a mask, as clicks prompt SAM (ours, small)."""

    def __init__(self, channels: int = 64, fine: int = 32, finest: int = 16) -> None:
        super().__init__()
        self.coarse = nn.Conv2d(LEVELS[3], channels, 1)
        self.middle = nn.Conv2d(LEVELS[2], channels, 1)
        self.norm = nn.GroupNorm(1, channels)
        self.enter = nn.Conv2d(3 * channels + 5, channels, 1)
        self.mix = nn.Sequential(*(Mix(channels, dilation) for dilation in (1, 2, 3, 1)))
        self.to_fine = nn.Conv2d(channels, fine, 1)
        self.fine = nn.Conv2d(LEVELS[1], fine, 1)
        self.mix_fine = Mix(fine, 1)
        self.to_finest = nn.Conv2d(fine, finest, 1)
        self.finest = nn.Conv2d(LEVELS[0], finest, 1)
        self.leave = nn.Conv2d(finest, 1, 3, padding=1)

    def forward(self, levels: Sequence[Tensor], points: Tensor) -> Tensor:
        """Mask logits [n, H / 4, W / 4].

        Args:
            levels: of one picture, standardised, [1, c, h, w] each.
            points: [n, 2], (x, y) in 0..1.
        """
        finest, fine, middle, coarse = levels
        base = self.norm(self.middle(middle) + _enlarged(self.coarse(coarse)))
        height, width = base.shape[-2:]
        asked = functional.grid_sample(
            base.float(), (2 * points - 1)[None, :, None].float(), align_corners=False, padding_mode="border"
        )
        asked = asked[0, :, :, 0].T[:, :, None, None].to(base.dtype)  # [n, C, 1, 1]
        shared = base.expand(len(points), -1, -1, -1)
        joined = [shared, shared * asked, asked.expand_as(shared), _offsets(points, height, width).to(base.dtype)]
        x = self.mix(self.enter(torch.cat(joined, 1)))
        x = functional.gelu(_enlarged(self.to_fine(x)) + self.fine(fine))
        x = self.mix_fine(x)
        x = functional.gelu(_enlarged(self.to_finest(x)) + self.finest(finest))
        logits: Tensor = self.leave(x)[:, 0]
        return logits


def _enlarged(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def _offsets(points: Tensor, height: int, width: int) -> Tensor:
    """How far each cell is from each point, [n, 5, height, width]: both ways, the distance, and two nearnesses."""
    y = torch.arange(height, device=points.device) + 0.5 - height * points[:, 1:]
    x = torch.arange(width, device=points.device) + 0.5 - width * points[:, :1]
    down, across = y[:, :, None].expand(-1, -1, width) / 16, x[:, None].expand(-1, height, -1) / 16
    far = (down**2 + across**2).sqrt()
    return torch.stack([across, down, far, (-32 * far**2).exp(), (-4 * far**2).exp()], 1)
