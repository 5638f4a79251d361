"""A scheduler without a model, to run strategies on random states and made-up reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenprune.base import Strategy
from tokenprune.layout import SequenceLayout
from tokenprune.reads import Projector, Read
from tokenprune.scheduler import TokenScheduler
from tokenprune.state import spread_rows

WIDTH, CHANNELS, PIXELS = 6, 8, 56


def layout_of(rows: Sequence[Sequence[int]]) -> SequenceLayout:
    """A right-padded batch: row r holds images of `rows[r]` tokens, with a text token before each and two behind."""
    masks = [[t for n in images for t in [False] + [True] * n] + [False, False] for images in rows]
    length = max(len(mask) for mask in masks)
    image_tokens = torch.tensor([mask + [False] * (length - len(mask)) for mask in masks])
    valid = torch.tensor([[i < len(mask) for i in range(length)] for mask in masks])
    return SequenceLayout.from_mask(image_tokens, valid)


class Bench(TokenScheduler):
    """Runs all layers by adding noise to the active states; every read is drawn per row from the row's own seed."""

    def __init__(
        self,
        strategy: Strategy,
        rows: Sequence[Sequence[int]],
        layers: int = 12,
        *,
        seeds: Sequence[int] | None = None,
        given: dict[str, Any] | None = None,
        readable: Iterable[type[Read]] | None = None,
        seed: int = 0,
    ) -> None:
        layout = layout_of(rows)
        self.seeds, self.given = list(seeds or range(len(rows))), given or {}
        self.readable = frozenset(Read.__subclasses__()) if readable is None else frozenset(readable)
        super().__init__(strategy, layout, layers, model="bench", seed=seed)
        self.embeddings = self.drawn("embeddings", WIDTH)
        self.states = self.embeddings.clone()

    def drawn(self, field: str, *shape: int) -> Tensor:
        """float32 [batch, N, *shape]; what a row gets depends on its seed and its own number of tokens only."""
        counts = self.layout.counts.tolist()
        result = torch.zeros(len(counts), max(counts, default=0), *shape)
        for row, (count, seed) in enumerate(zip(counts, self.seeds, strict=True)):
            generator = torch.Generator().manual_seed(seed * 1000 + sum(map(ord, field)))
            result[row, :count] = torch.randn(count, *shape, generator=generator)
        return result

    def offers(self) -> frozenset[type[Read]]:
        return self.readable

    def provide(self, read: Read) -> Any:
        if read.field in self.given:
            return self.given[read.field]
        if isinstance(read, Projector):
            return lambda features: features[..., :WIDTH] * 2
        if read.field == "hidden":
            return self.states
        if read.field == "embeddings":
            return self.embeddings
        if read.field == "attention":
            return self.drawn("attention").masked_fill(~self.state.active, float("-inf"))
        if read.field in ("cls_attention", "received_attention"):
            return self.drawn(read.field).exp()
        if read.field in ("keys", "layer_keys"):
            return self.drawn(read.field, CHANNELS)
        if read.field == "features":
            return self.drawn("features", CHANNELS)
        assert read.field == "pixels", read
        draws = torch.stack([self.drawn_row("pixels", seed, PIXELS, PIXELS, 3) for seed in self.seeds])
        return (draws * 40 + 128).clamp(0, 255).to(torch.uint8)

    @staticmethod
    def drawn_row(field: str, seed: int, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed * 1000 + sum(map(ord, field))))

    def hidden(self) -> Tensor:
        return self.states

    def write(self, index: Tensor, values: Tensor) -> None:
        self.states = spread_rows(values, index, self.states.shape[1], base=self.states)

    def run(self) -> Bench:
        """Walk through all layers; a layer moves every active state."""
        for layer in range(self.layers):
            self.enter(layer)
            self.account(layer, self.layout.image_tokens.shape[1])
            moved = self.states + self.drawn(f"layer{layer}", WIDTH)
            self.states = torch.where(self.state.active[..., None], moved, self.states)
        self.finish()
        return self
