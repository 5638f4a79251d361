"""Sa2VA on transformers' own classes: from a picture and queries to masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Sam2Model

from tokenprune.core.reads import (
    ClsAttention,
    ClsQuery,
    Crops,
    Projector,
    Read,
    ReceivedAttention,
    TowerFeatures,
    TowerKeys,
    TowerStates,
    TowerValues,
)
from tokenprune.engine import VisionSource
from tokenprune.errors import InputError
from tokenprune.utils.images import ImageInput, to_rgb
from tokenprune.utils.stopwatch import stage
from tokenprune_adapters.llava.prompt import prompt_ids
from tokenprune_adapters.sa2va import sam2
from tokenprune_adapters.sa2va.chat import IMAGE, IMAGE_END, IMAGE_START, PHRASE, ChatFormat
from tokenprune_adapters.sa2va.results import EncodedImage, PreparedImage
from tokenprune_adapters.sa2va.tiles import MEAN, STD, cut, tile_grid, values
from tokenprune_adapters.sa2va.tokenizer import QwenTokenizer
from tokenprune_adapters.sa2va.tower import MERGED, TilesRun, run_tower
from tokenprune_adapters.segmentation.data import Answered, SegmenterInputs
from tokenprune_adapters.segmentation.image_encoding import in_turn
from tokenprune_adapters.segmentation.many.transfer import batched
from tokenprune_adapters.segmentation.sam.masks import MaskSizes
from tokenprune_adapters.segmentation.segmenter import Segmenter

STOP_IDS = 16  # ids of an answer's end that may spell a text that ends it

_ANSWERS: dict[type[Read], Callable[[TilesRun, Any], Tensor]] = {
    TowerFeatures: lambda run, read: run.features,
    ClsAttention: lambda run, read: run.cls_attention(read.layer, read.heads),
    ReceivedAttention: lambda run, read: run.received_attention(read.layer),
    ClsQuery: lambda run, read: run.cls_query(read.layer),
    Crops: lambda run, read: run.crops,
    TowerKeys: lambda run, read: run.keys(read.layer, read.heads),
    TowerValues: lambda run, read: run.values(read.layer),
    TowerStates: lambda run, read: run.mean_state(read),
}


class Sa2vaModel(Segmenter):
    """A loaded Sa2VA; see `segment` for what it does. Every query is a batch row.

    A mask is made from the state of its [SEG] itself, not from the state before it, as in the other families. So a
    [SEG] that is the last token of a generated answer that was cut off has no mask, as in the authors' code.

    For strategies the tiles are one image, with one grid, and the whole picture behind them is another (ours).

    Args:
        sam: SAM 2, which encodes the picture a second time and draws the masks.
        chat: the words around a turn.
        max_tiles: largest number of tiles of a picture, besides the whole picture.
        parts: see `Segmenter`.
    """

    prepared_type, encoded_type = PreparedImage, EncodedImage
    reads_mask_token = True
    forced_answer = "Sure, [SEG]."
    tokenizer: QwenTokenizer

    def __init__(self, *, sam: Sam2Model, chat: ChatFormat, max_tiles: int, **parts: Any) -> None:
        super().__init__(**parts)
        self.sam = sam
        self.chat = chat
        self.max_tiles = max_tiles
        self.image_cache.size = 1  # the states of 13 tiles in every layer of the tower: 0.7 GB in half precision
        config: Any = self.tower.config
        self.side: int = config.image_size[0]
        """Side of a tile, in pixels."""
        self.tile_side: int = self.side // config.patch_size[0] // MERGED
        """Image tokens of a tile, each way."""

    # prompts ---------------------------------------------------------------------------------------------------------

    def special_tokens(self) -> Sequence[str]:
        """[SEG], all added tokens of the tokenizer, and the marks of turns."""
        marks = (*self.chat.before.split(), *self.chat.between.split(), *self.chat.stops)
        return (*self.seg_tokens, *self.tokenizer.added, *(mark for mark in marks if mark.startswith("<|")))

    def prompt_ids(self, prompt: str) -> list[int]:
        """Ids of a whole prompt, with `IMAGE_ID` for the image, between its marks. Raises InputError unless it has
        `<image>` once."""
        return prompt_ids(self.tokenizer, prompt.replace(IMAGE, f"{IMAGE_START}{IMAGE}{IMAGE_END}"))

    def ask(self, queries: list[str], sentences: list[bool], answer: str) -> list[str]:
        """A prompt for each query: a phrase as the authors' evaluation asks it, a sentence as it is (ours)."""
        given = self.forced_answer if answer == "forced" else ""
        both = zip(queries, sentences, strict=True)
        asked = [f"{IMAGE}\n{query}" if flag else f"{IMAGE}\n {PHRASE.format(query)}" for query, flag in both]
        return [self.chat.prompt(said, given) for said in asked]

    def wordings(self, prompts: Sequence[str], queries: Sequence[str] | None = None) -> dict[str, list[list[str]]]:
        """None: no read of texts is provided, since the tower has no text tower beside it."""
        return {}

    def given_answer(self, prompt: str) -> str:
        """The last answer in a whole prompt."""
        return self.chat.given_answer(prompt)

    def texts(self, inputs: SegmenterInputs, answered: Answered, answer: str) -> list[str]:
        """The answer of each prompt, without what ends it."""
        return [self.chat.without_stop(text) for text in super().texts(inputs, answered, answer)]

    def end_ids(self) -> set[int]:
        """The tokenizer's end, and the tokens among the texts that end an answer."""
        stops = (self.tokenizer.token_id(stop) for stop in self.chat.stops)
        return {self.tokenizer.eos_id, *(found for found in stops if found is not None)}

    def ends(self, said: Sequence[int]) -> bool:
        """Whether an answer ends with a text that no single token spells; line breaks do not count."""
        spelt = [stop for stop in self.chat.stops if self.tokenizer.token_id(stop) is None]
        if not spelt:
            return False
        text = self.tokenizer.decode(said[-STOP_IDS:], skip_control=False).replace("\r", "").replace("\n", "")
        return text.endswith(tuple(spelt))

    # pictures --------------------------------------------------------------------------------------------------------

    def prepare_image(self, image: ImageInput) -> PreparedImage:
        """Tiles for the tower, and the picture stretched to SAM 2's square.

        Raises:
            InputError: not an image, or several.
        """
        if isinstance(image, (list, tuple)):
            raise InputError(
                f"{len(image)} images found, expected one: videos of Sa2VA are not supported; segment frames one by one"
            )
        rgb = to_rgb(image)
        config: Any = self.sam.config.prompt_encoder_config
        square: int = config.image_size
        sizes = MaskSizes((rgb.height, rgb.width), (square, square), square)
        columns, rows = tile_grid(*rgb.size, self.side, self.max_tiles)
        return PreparedImage(
            cut(rgb, self.side, columns, rows), values(rgb, square, square)[None], sizes, columns=columns, rows=rows
        )

    @in_turn
    def encode_prepared(self, images: Sequence[PreparedImage]) -> list[EncodedImage]:
        """See `Segmenter.encode_prepared`."""
        with stage("vision tower"):
            tiles = batched([image.tiles for image in images], next(self.tower.parameters()))
            runs = run_tower(self.tower, tiles, [len(image.tiles) for image in images], self.select_layer)
            embeddings = [self.projector(run.features) for run in runs]
        with stage("mask encoder"):
            pixels = batched([image.sam_pixels for image in images], next(self.sam.parameters()))
            levels = sam2.embed_pictures(self.sam, pixels)
        pictures = [sam2.Sam2Features(*level) for level in zip(*(torch.split(one, 1) for one in levels), strict=True)]
        return [EncodedImage(*parts) for parts in zip(images, runs, embeddings, pictures, strict=True)]

    def picture(self, encoded: EncodedImage) -> Tensor:
        """The whole picture as the tower sees it, in its last or only tile: uint8 [1, side, side, 3]."""
        mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (MEAN, STD))
        pixels = (encoded.prepared.tiles[-1:].float().cpu() * std + mean) * 255
        return pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)

    def grid_box(self, height: int, width: int) -> tuple[float, float, float, float]:
        """All of the image, which tiles stretch: (top, left, bottom, right) in pixels of the image.

        Args:
            height, width: of the image.
        """
        return 0.0, 0.0, float(height), float(width)

    def image_cells(self, inputs: SegmenterInputs) -> tuple[Tensor, Tensor]:
        """Row and column of each image token, in the grid of all tiles or that of the whole picture behind them."""
        shown = inputs.sequence.image_tokens
        cells = [part.encoded.prepared.cells(self.tile_side) for part in inputs.by_image for _ in part.prompts]
        grid, image = torch.full((*shown.shape, 2), -1), torch.full(shown.shape, -1)
        for row, (own_grid, own_image) in enumerate(cells):
            here = shown[row].cpu()
            grid[row, here], image[row, here] = own_grid, own_image
        return grid.to(shown.device), image.to(shown.device)

    # reads and masks -------------------------------------------------------------------------------------------------

    def offers(self) -> frozenset[type[Read]]:
        """The kinds of reads that `vision_source` provides: the tower's, and the projector."""
        return frozenset((*_ANSWERS, Projector))

    def vision_source(
        self, encoded: Any, rows: int, texts: Mapping[str, Sequence[Sequence[str]]] | None = None
    ) -> VisionSource:
        """All reads of an encoded picture, for `rows` batch rows. `texts` are not read."""

        def provide(answer: Callable[[TilesRun, Any], Tensor], read: Any) -> Tensor:
            found = answer(encoded.tower, read)
            return found.expand(rows, *found.shape[1:])

        answers: dict[type[Read], Callable[[Any], Any]] = {
            kind: partial(provide, answer) for kind, answer in _ANSWERS.items()
        }
        return VisionSource({**answers, Projector: lambda read: self.projector}, encoded.tower.layers)

    def low_res_logits_of(
        self, states: Tensor, images: Sequence[EncodedImage], owners: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Low-resolution mask logits [n, h, w] and predicted IoU [n] of states [n, H] of [SEG]s."""
        home = images[0].sam_features.coarse.device
        prompts = self.mask_projection(states.to(home))
        return sam2.low_res_logits(self.sam, [image.sam_features for image in images], prompts, owners)
