"""A segmentation model and a dataset that run in milliseconds, for tests of the evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from tokenprune import hookimpl
from tokenprune.core.decisions import Decision, Keep, Merge, Restore
from tokenprune.core.stage import Shape, Stage
from tokenprune.core.strategy import Strategy, StrategyOptions
from tokenprune.core.tokens import Tokens
from tokenprune.core.trace import Trace
from tokenprune.datasets.base import Dataset, Query, Scene
from tokenprune.engine import model_turn, prune
from tokenprune.errors import InputError
from tokenprune.loading.adapter import Adapter
from tokenprune.testing.tiny_decoders import tiny_llama

SIDE = 6  # cells of the image-token grid per side
SPLITS = ("train", "val")


@dataclass(frozen=True)
class FakeEncoded:
    """Image tokens [N, width] and the image's size."""

    tokens: Tensor
    size: tuple[int, int]


@dataclass(frozen=True)
class FakeInputs:
    """Decoder input, image tokens first."""

    embeds: Tensor
    attention_mask: Tensor
    image_tokens: Tensor
    mask_query: Tensor


@dataclass(frozen=True)
class FakeResult:
    """Masks and trace."""

    masks: Tensor
    text: Any
    trace: Trace | None


class FakeModel(nn.Module):
    """Image tokens are mean colours, words are hashed, masks are where the mask query agrees with a cell's colour."""

    def __init__(self, layers: int = 4, name: str = "fake") -> None:
        super().__init__()
        self.decoder = tiny_llama(layers)
        self.name = name
        self.encoded = 0
        generator = torch.Generator().manual_seed(1)
        self.register_buffer("colours", torch.randn(3, 32, generator=generator))

    def encode_image(self, image: Any) -> FakeEncoded:
        """One token per cell."""
        if isinstance(image, FakeEncoded):
            return image
        if isinstance(image, (str, Path)):
            try:
                image = np.asarray(Image.open(image).convert("RGB"))
            except OSError as error:
                raise InputError(f"image {str(image)!r} cannot be read; give an image file") from error
        self.encoded += 1
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        cells = functional.adaptive_avg_pool2d(pixels, SIDE)[0].flatten(1).T
        return FakeEncoded(cells @ self.colours, tuple(pixels.shape[-2:]))

    def build_inputs(self, image: Any, queries: Any, *, is_sentence: Any = None) -> FakeInputs:
        """Image tokens, then one token per word; right-padded."""
        texts = [queries] if isinstance(queries, str) else list(queries)
        if not all(text.strip() for text in texts):
            raise InputError("query is empty; describe what to segment")
        words = [[sum(map(ord, word)) % 64 for word in text.split()] for text in texts]
        length = max(map(len, words))
        ids = torch.tensor([row + [0] * (length - len(row)) for row in words])
        text = self.decoder.get_input_embeddings()(ids)
        embeds = torch.cat((self.encode_image(image).tokens.expand(len(words), -1, -1), text), 1)
        mask = torch.ones(embeds.shape[:2], dtype=torch.int64)
        query = torch.zeros(embeds.shape[:2], dtype=torch.bool)
        for row, own in enumerate(words):
            mask[row, SIDE**2 + len(own) :] = 0
            query[row, SIDE**2 + len(own) - 1] = True
        cells = torch.zeros_like(query)
        cells[:, : SIDE**2] = True
        return FakeInputs(embeds, mask, cells, query)

    def run_decoder(self, inputs: FakeInputs, strategy: Strategy | None = None) -> tuple[Tensor, Trace | None]:
        """One pass, through the engine where there is a strategy."""
        marks = {"mask_query": inputs.mask_query}
        context: AbstractContextManager[Any] = nullcontext()
        if strategy is not None:
            context = prune(self.decoder.model, strategy, image_tokens=inputs.image_tokens, queries=marks)
        with model_turn(self.decoder), context as run:
            output = self.decoder.model(
                inputs_embeds=inputs.embeds, attention_mask=inputs.attention_mask, use_cache=False
            )
        return output.last_hidden_state, None if run is None else run.trace

    def grid_box(self, height: int, width: int) -> tuple[float, float, float, float]:
        """The whole image."""
        return 0.0, 0.0, float(height), float(width)

    @torch.inference_mode()
    def segment(self, image: Any, query: Any = None, strategy: Any = None, *, is_sentence: Any = None) -> FakeResult:
        """Masks bool [queries, H, W]."""
        encoded = self.encode_image(image)
        inputs = self.build_inputs(encoded, query)
        states, trace = self.run_decoder(inputs, strategy)
        states = states[inputs.mask_query]
        logits = (states @ encoded.tokens.T).reshape(-1, 1, SIDE, SIDE)
        logits = logits - logits.mean((-1, -2), keepdim=True)
        masks = functional.interpolate(logits, encoded.size, mode="bilinear")[:, 0] > 0
        return FakeResult(masks, query, trace)


class FakeData(Dataset):
    """Random pictures with a rectangle; queries of two kinds."""

    name = "rectangles"
    splits = SPLITS
    kinds = ("short", "long")

    def scenes(self, split: str, limit: int | None = None, seed: int = 0) -> Iterator[Scene]:
        """See `Dataset.scenes`."""
        rng = np.random.default_rng([SPLITS.index(split), seed])
        given = 0
        while limit is None or given < limit:
            image = rng.integers(0, 256, (30, 36, 3), dtype=np.uint8)
            mask = np.zeros((30, 36), dtype=bool)
            mask[5:15, 6 : int(rng.integers(12, 30))] = True
            queries = [Query("red thing", "short", mask), Query("the thing left of the star", "long", ~mask)]
            queries = queries[: None if limit is None else limit - given]
            given += len(queries)
            yield Scene(f"{split}-{given}", image, queries)


class Front(Strategy):
    """Keeps the first image tokens from a layer on."""

    name = "front"
    budget_option = "keep"

    class Options(StrategyOptions):
        """Options of `front`."""

        keep: float = 0.5
        layer: int = 1
        note: str | None = None

    def stages(self, shape: Shape) -> Iterable[Stage]:
        """One stage."""
        yield Stage("cut", self.options.layer, tokens=int(shape.image_tokens * self.options.keep + 1e-6))

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        """The first ones."""
        return Keep.top(-torch.arange(tokens.exists.shape[1]).float().expand_as(tokens.exists), tokens.target)


class Whole(Strategy):
    """No pruning."""

    name = "whole"

    def stages(self, shape: Shape) -> Iterable[Stage]:
        """None."""
        return ()

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        """Never asked."""
        raise AssertionError


class FakeAdapter(Adapter):
    """Loads the fake model from a folder whose config says so."""

    @classmethod
    def matches(cls, source: str, config: Any) -> bool:
        """By architecture."""
        return config.get("architectures") == ["Fake"]

    @classmethod
    def load(cls, source: str, **options: Any) -> FakeModel:
        """A new one."""
        return FakeModel()


class FakePlugin:
    """Registers all of the above."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "config.json").write_text('{"architectures": ["Fake"]}')

    @hookimpl
    def tokenprune_register_strategies(self, register: Any) -> None:
        """`front`, `whole` and `tour`."""
        register("front", Front)
        register("whole", Whole)
        register("tour", Tour)

    @hookimpl
    def tokenprune_register_datasets(self, register: Any) -> None:
        """`rectangles`."""
        register("rectangles", FakeData)

    @hookimpl
    def tokenprune_register_adapters(self, register: Any) -> None:
        """The adapter."""
        register("fake-adapter", FakeAdapter)

    @hookimpl
    def tokenprune_register_models(self, register: Any) -> None:
        """The model."""
        register("fake", lambda: self.folder)


class Tour(Strategy):
    """Parks half of the tokens, restores them, then merges all into two: every kind of decision in one run."""

    name = "tour"

    def stages(self, shape: Shape) -> Iterable[Stage]:
        """Three."""
        yield Stage("rest", 0, tokens=shape.image_tokens // 2)
        yield Stage("return", 1, tokens=shape.image_tokens)
        yield Stage("fold", 2, tokens=2)

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        """By the stage's name."""
        even = torch.arange(tokens.exists.shape[1]).expand_as(tokens.exists) % 2 == 0
        if stage.name == "rest":
            return Keep.where(even, rest="park", scores=even.float())
        if stage.name == "return":
            return Restore.where(tokens.parked)
        batch, size = tokens.exists.shape
        index = torch.tensor([[0, size - 1]]).expand(batch, -1)
        return Merge(index, weights=torch.full((batch, 2, size), 1 / size))
