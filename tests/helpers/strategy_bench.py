"""A scheduler without a model, to run strategies on random states and synthetic reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tokenprune.core.layout import SequenceLayout
from tokenprune.core.reads import (
    AttentionFrom,
    LayerValues,
    PositionKernel,
    Projector,
    Read,
    RotaryTables,
    TextValues,
)
from tokenprune.core.scheduling.scheduler import TokenScheduler
from tokenprune.core.scheduling.state import spread_rows
from tokenprune.core.stage import Shape, equivalent_tokens
from tokenprune.core.strategy import Strategy
from tokenprune.errors import BudgetError

WIDTH, CHANNELS, PIXELS, HEADS = 6, 8, 56, 4


def layout_of(
    rows: Sequence[Sequence[int]], grids: Sequence[Sequence[tuple[int, int]]] | None = None
) -> SequenceLayout:
    """A right-padded batch: row r holds images of `rows[r]` tokens, with a text token before each and two behind.

    With `grids`, height and width of each image's grid, they have these cells; else only square ones have cells.
    """
    masks = [[t for n in images for t in [False] + [True] * n] + [False, False] for images in rows]
    length = max(len(mask) for mask in masks)
    image_tokens = torch.tensor([mask + [False] * (length - len(mask)) for mask in masks])
    valid = torch.tensor([[i < len(mask) for i in range(length)] for mask in masks])
    if grids is None:
        return SequenceLayout.from_mask(image_tokens, valid)
    cells = torch.full((*image_tokens.shape, 2), -1)
    shapes = [shape for row in grids for shape in row]
    cells[image_tokens] = torch.cat([torch.cartesian_prod(*map(torch.arange, shape)).view(-1, 2) for shape in shapes])
    return SequenceLayout.from_mask(image_tokens, valid, grid=cells)


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
        grids: Sequence[Sequence[tuple[int, int]]] | None = None,
    ) -> None:
        layout = layout_of(rows, grids)
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
        if isinstance(read, AttentionFrom):
            return self.attention(read)
        if isinstance(read, PositionKernel):
            return self.drawn("kernel", self.queries(read.query)).exp().transpose(1, 2)
        if read.field in ("text_hidden", "text_embeddings", "text_keys"):
            return self.drawn_text(read.field, CHANNELS if read.field == "text_keys" else WIDTH)
        if isinstance(read, RotaryTables):
            return self.rotary_tables()
        if isinstance(read, (LayerValues, TextValues)):
            size = HEADS * CHANNELS if read.heads != "mean" else CHANNELS
            text = isinstance(read, TextValues)
            drawn = self.drawn_text("text_values", size) if text else self.drawn("layer_values", size)
            values = drawn if text else drawn.masked_fill(~self.state.active[..., None], 0)
            return values.unflatten(-1, (HEADS, CHANNELS)) if read.heads == "each" else values
        if read.field == "layer_keys":
            return self.drawn("layer_keys", CHANNELS).masked_fill(~self.state.active[..., None], 0)
        if read.field in ("cls_attention", "received_attention"):
            return self.drawn(read.field).exp()
        if read.field in ("keys", "layer_keys"):
            return self.drawn(read.field, CHANNELS)
        if read.field in ("features", "cls_features", "cls_query", "values", "tower_states", "clip_image_embeddings"):
            return self.drawn(read.field, CHANNELS)
        if read.field == "crops":  # an image is one crop
            return self.layout.gather_slots(self.layout.image_number)
        if read.field == "clip_text_embeddings":  # as many texts as the row's seed says
            texts = [self.drawn_row("text", seed, 1 + seed % 3, CHANNELS) for seed in self.seeds]
            exist = [torch.ones(len(text), dtype=torch.bool) for text in texts]
            return pad_sequence(texts, batch_first=True), pad_sequence(exist, batch_first=True)
        assert read.field == "pixels", read
        draws = torch.stack([self.drawn_row("pixels", seed, PIXELS, PIXELS, 3) for seed in self.seeds])
        return (draws * 40 + 128).clamp(0, 255).to(torch.uint8)

    def drawn_text(self, field: str, width: int) -> Tensor:
        """float32 [batch, T, width], what each row's text tokens have."""
        counts = (self.layout.text_slots >= 0).sum(1).tolist()
        result = torch.zeros(len(counts), max(counts), width)
        for row, (count, seed) in enumerate(zip(counts, self.seeds, strict=True)):
            result[row, :count] = self.drawn_row(field, seed, count, width)
        return result

    def rotary_tables(self) -> Tensor:
        """float32 [batch, N, 1, 2, CHANNELS], at positions that count real tokens; zeros where one is not active."""
        places = self.layout.gather_slots(self.layout.places)
        angles = places[..., None] * 10000.0 ** (-torch.arange(CHANNELS) / CHANNELS)
        tables = torch.stack((angles.cos(), angles.sin()), -2)[:, :, None]
        return tables.masked_fill(~self.state.active[..., None, None, None], 0)

    def queries(self, name: str) -> int:
        """The most query rows of that name that a batch row has."""
        return self.layout.query_rows(name).shape[1]

    def attention(self, read: AttentionFrom) -> Tensor:
        """Drawn at random: [batch, N], with the axes before N that the read keeps apart."""
        axes = [HEADS] * (read.heads == "each") + [self.queries(read.query)] * (read.reduce == "each")
        drawn = self.drawn("attention", *axes)
        drawn = drawn.exp().movedim(1, -1) if axes else drawn
        inactive = ~self.state.active.reshape(len(drawn), *[1] * len(axes), -1)
        return drawn.masked_fill(inactive, float("-inf"))

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


def check_budget_is_met_within_a_token(kind: type[Strategy], total: int, budget: float) -> None:
    """For strategies that choose before the decoder: at least one token, and as many as the budget has room for."""
    shape = Shape(12, total)
    if budget * total < 1 - 1e-6:
        with pytest.raises(BudgetError, match="raise the budget"):
            kind(budget=budget).bind(shape)
        return
    spent = equivalent_tokens(list(kind(budget=budget).bind(shape).stages(shape)), shape)
    assert budget * total - 1 - 1e-6 < spent <= budget * total + 1e-6
