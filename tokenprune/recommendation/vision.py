"""A vision side of random values, of the sizes of a real one: strategies that read it can be timed without images."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.core import reads
from tokenprune.core.reads import Read
from tokenprune.engine.interface.vision_source import VisionSource

TOWER, HEAD, CLIP, PIXELS, LAYERS = 1024, 64, 768, 336, 24  # of CLIP ViT-L/14 at 336 pixels, as in LLaVA-1.5


@dataclass
class RandomVision:
    """Answers to the reads of a vision side.

    Attributes:
        width: of the tower's states.
        hidden: of the decoder's states, the projector's output.
        layers: of the tower.
        dtype, device: of the decoder.
    """

    hidden: int
    dtype: torch.dtype
    device: torch.device
    width: int = TOWER
    layers: int = LAYERS

    def __post_init__(self) -> None:
        with torch.device(self.device):
            first, second = nn.Linear(self.width, self.hidden), nn.Linear(self.hidden, self.hidden)
            self._projector = nn.Sequential(first, nn.GELU(), second).to(self.dtype)

    def source(self, batch: int, tokens: int, kinds: Collection[type[Read]]) -> VisionSource:
        """The answers for a batch, [batch, tokens, …].

        Args:
            batch: rows.
            tokens: image tokens of each.
            kinds: reads to provide; those that nothing is known of are left out.
        """
        known = self._answers(batch, tokens)
        return VisionSource({kind: known[kind] for kind in kinds if kind in known}, self.layers, "random values")

    @staticmethod
    def kinds() -> frozenset[type[Read]]:
        """All reads that can be answered."""
        return frozenset(RandomVision(1, torch.float32, torch.device("cpu"), 1)._answers(1, 1))

    def _answers(self, batch: int, tokens: int) -> dict[type[Read], Callable[[Any], Any]]:
        generator = torch.Generator().manual_seed(1)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(batch, *shape, generator=generator).to(self.device)

        states, first_row = drawn(tokens, self.width), drawn(1, self.width).expand(-1, tokens, -1)
        features, row = states.to(self.dtype), first_row.to(self.dtype)
        weights = drawn(tokens).softmax(1)
        clip, texts = drawn(tokens, CLIP), drawn(1, CLIP)
        exist = torch.ones(batch, 1, dtype=torch.bool, device=self.device)
        pixels = torch.zeros(batch, PIXELS, PIXELS, 3, dtype=torch.uint8, device=self.device)
        return {
            reads.TowerFeatures: lambda read: features,
            reads.ClsAttention: lambda read: weights,
            reads.ReceivedAttention: lambda read: weights,
            reads.ClsFeatures: lambda read: row,
            reads.ClsQuery: lambda read: first_row,
            reads.Crops: lambda read: torch.zeros(batch, tokens, dtype=torch.int64, device=self.device),
            reads.TowerKeys: lambda read: states[..., :HEAD] if read.heads == "mean" else states,
            reads.TowerValues: lambda read: states,
            reads.TowerStates: lambda read: states,
            reads.ClipImageEmbeddings: lambda read: clip,
            reads.ClipTextEmbeddings: lambda read: (texts, exist),
            reads.Projector: lambda read: lambda taken: self._projector(taken.to(self.dtype)),
            reads.Pixels: lambda read: pixels,
        }
