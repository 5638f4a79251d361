"""The photo models: from a picture and queries to masks, by one point for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tokenprune.core.reads import Crops, Pixels, Read, TowerFeatures
from tokenprune.engine.interface.vision_source import VisionSource
from tokenprune.errors import OptionError
from tokenprune.utils.images import ImageInput, to_rgb
from tokenprune.utils.stopwatch import stage
from tokenprune_adapters.llava.prompt import IMAGE_ID
from tokenprune_adapters.photos.parts import MaskHead, Standardise, best_points, gather_cells
from tokenprune_adapters.photos.text import END, SEG, SEG_IN_VOCABULARY, TURN, asked, forced
from tokenprune_adapters.photos.tower import STRIDE
from tokenprune_adapters.segmentation.data import SegmenterInputs
from tokenprune_adapters.segmentation.image_encoding import in_turn
from tokenprune_adapters.segmentation.sam.masks import MaskSizes
from tokenprune_adapters.segmentation.segmenter import Segmenter

CELLS = 280
"""Image tokens of a picture, about."""
LONGEST = 32
"""Rows or columns of image tokens at most: pictures of more extreme shapes get fewer tokens."""
OUTSIDE = -100.0  # logit beyond the picture


def fitted(width: int, height: int, cells: float | None = None) -> tuple[int, int]:
    """(columns, rows) of image tokens of a picture: about `cells` (None: `CELLS`), its shape kept, at most `LONGEST` a
    side."""
    scale = ((cells or CELLS) / (width * height)) ** 0.5
    return min(max(round(width * scale), 1), LONGEST), min(max(round(height * scale), 1), LONGEST)


@dataclass(frozen=True)
class PreparedImage:
    """A picture as the tower wants it.

    Args:
        pixels: uint8 [1, 3, h, w], sides multiples of 32.
        sizes: how masks get back to the image.
    """

    pixels: Tensor
    sizes: MaskSizes


@dataclass(frozen=True)
class PhotoTowerRun:
    """What the tower saw of one picture.

    Args:
        levels: the standardised levels, [1, c, h, w] each, finest first.
        cells: [1, CELL, rows, columns], what the projector reads.
    """

    levels: Sequence[Tensor]
    cells: Tensor

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of image tokens."""
        return int(self.cells.shape[2]), int(self.cells.shape[3])

    @property
    def features(self) -> Tensor:
        """[1, N, CELL], row by row."""
        return self.cells.flatten(2).transpose(1, 2)


@dataclass(frozen=True)
class EncodedImage:
    """A picture after the tower. N image tokens, H decoder width.

    Args:
        prepared: what went in.
        tower: what the tower saw.
        image_embeddings: [1, N, H].
        image_valid: None: every image token shows a part of the picture.
    """

    prepared: PreparedImage
    tower: PhotoTowerRun
    image_embeddings: Tensor
    image_valid: Tensor | None = None


class PhotoModel(Segmenter):
    """A loaded photo model; see `segment` for what it does. Every query is a batch row.

    The mask query's state becomes one point of the picture, and the mask head draws the thing at that point, as a click
    prompts SAM: nothing but the point gets from the decoder to the mask. The tower is convolutional and has no [CLS]
    and no attention: strategies can read its features, and all that is the decoder's.

    Args:
        standardise: of the tower's levels.
        head: draws the masks.
        parts: see `Segmenter`; `mask_projection` is a `ReadOut`.
    """

    prepared_type, encoded_type = PreparedImage, EncodedImage
    seg_tokens: ClassVar[tuple[str, ...]] = (SEG,)
    forced_answer: ClassVar[str] = SEG
    usual_answers: ClassVar[tuple[str, ...]] = (SEG,)

    def __init__(self, *, standardise: Standardise, head: MaskHead, **parts: Any) -> None:
        blocks = len(parts["tower"].blocks)
        super().__init__(select_layer=-1, mark_image=False, tower_layers=blocks, **parts)
        self.standardise = standardise
        self.head = head

    # prompts ---------------------------------------------------------------------------------------------------------

    def special_tokens(self) -> Sequence[str]:
        """Tokens that a query must not contain."""
        return (*self.seg_tokens, TURN, END, SEG_IN_VOCABULARY)

    def ask(self, queries: list[str], sentences: list[bool], answer: str) -> list[str]:
        """A whole prompt for each query; phrases and sentences are asked alike."""
        return [forced(text) for text in queries]

    def prompts(
        self,
        query: str | Sequence[str] | None,
        answer: str = "forced",
        prompt: str | Sequence[str] | None = None,
        is_sentence: bool | Sequence[bool] | None = None,
    ) -> list[str]:
        """See `Prompts.prompts`.

        Raises:
            OptionError: also with answer="generate".
        """
        if answer == "generate":
            raise OptionError(f"answer='generate' found, but {self.name} was trained on masks alone; use 'forced'")
        return super().prompts(query, answer, prompt, is_sentence)

    def wordings(self, prompts: Sequence[str], queries: Sequence[str] | None = None) -> dict[str, list[list[str]]]:
        """The texts of each prompt, see `Prompts.wordings`."""
        found = [asked(prompt) for prompt in prompts]
        return {"question": found, "query": found}

    # pictures --------------------------------------------------------------------------------------------------------

    def prepare_image(self, image: ImageInput) -> PreparedImage:
        """The picture resized (bilinear) to a whole number of cells.

        Raises:
            InputError: not an image.
        """
        rgb = to_rgb(image)
        columns, rows = fitted(*rgb.size)
        resized = rgb.resize((columns * STRIDE, rows * STRIDE), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None].contiguous()
        sizes = MaskSizes((rgb.height, rgb.width), (rows * STRIDE, columns * STRIDE), LONGEST * STRIDE)
        return PreparedImage(pixels, sizes)

    @in_turn
    def encode_prepared(self, images: Sequence[PreparedImage]) -> list[EncodedImage]:
        """See `Segmenter.encode_prepared`; pictures have sizes of their own, so the tower runs on each by itself."""
        encoded = []
        for image in images:
            with stage("vision tower"):
                weight = next(self.tower.parameters())
                pixels = image.pixels.to(weight.device).to(weight.dtype) / 255
                levels = self.standardise(self.tower(pixels))
                run = PhotoTowerRun(levels, gather_cells(levels))
                encoded.append(EncodedImage(image, run, self.projector(run.cells)))
        return encoded

    def picture(self, encoded: EncodedImage) -> Tensor:
        """The resized picture, uint8 [1, h, w, 3]."""
        return encoded.prepared.pixels.permute(0, 2, 3, 1)

    def grid_box(self, height: int, width: int) -> tuple[float, float, float, float]:
        """The whole image: (0, 0, height, width)."""
        return 0.0, 0.0, float(height), float(width)

    def image_cells(self, inputs: SegmenterInputs) -> tuple[Tensor, Tensor]:
        """The cell of each image token, and that all image tokens of a row are of one image."""
        sequence = inputs.sequence
        shown = sequence.token_ids == IMAGE_ID
        number = shown.cumsum(1) - 1
        columns = [part.encoded.tower.grid[1] for part in inputs.by_image for _ in part.prompts]
        width = torch.tensor(columns, device=number.device)[:, None]
        cells = torch.stack((number // width, number % width), -1)
        return cells.masked_fill(~shown[..., None], -1), torch.where(shown, 0, -1)

    # reads -----------------------------------------------------------------------------------------------------------

    def offers(self) -> frozenset[type[Read]]:
        """The kinds of reads of the vision side: features and pixels, for want of [CLS] and attention."""
        return frozenset((TowerFeatures, Crops, Pixels))

    def vision_source(
        self, encoded: Any, rows: int, texts: Mapping[str, Sequence[Sequence[str]]] | None = None
    ) -> VisionSource:
        """See `DecoderRuns.vision_source`."""
        features = encoded.tower.features

        def for_rows(value: Tensor) -> Tensor:
            return value.expand(rows, *value.shape[1:])

        return VisionSource(
            {
                TowerFeatures: lambda read: for_rows(features),
                Crops: lambda read: torch.zeros(rows, features.shape[1], dtype=torch.int64, device=features.device),
                Pixels: lambda read: for_rows(self.picture(encoded)),
            },
            self.tower_layers,
        )

    # masks -----------------------------------------------------------------------------------------------------------

    def points(self, states: Tensor, grid: tuple[int, int]) -> Tensor:
        """The points [n, 2], (x, y) in 0..1, that mask-query states [n, H] answer with.

        Args:
            states: final-norm states.
            grid: rows and columns of image tokens.
        """
        return best_points(self.mask_projection(states, *grid), *grid)

    def low_res_logits_of(
        self, states: Tensor, images: Sequence[EncodedImage], owners: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Mask logits [n, 256, 256] of states [n, H], over a square of which the picture is the top left part."""
        side = LONGEST * STRIDE // 4
        logits = states.new_full((len(states), side, side), OUTSIDE)
        for number, image in enumerate(images):
            rows = [row for row, owner in enumerate(owners) if owner == number]
            if rows:
                points = self.points(states[rows].to(image.tower.cells.device), image.tower.grid)
                found = self.head(image.tower.levels, points)
                logits[rows, : found.shape[1], : found.shape[2]] = found.to(logits)
        return logits, logits.new_zeros(0)
