"""What segmentation models take in and give back, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from tokenprune.core.trace import Trace
from tokenprune_adapters.llava.prompt import DecoderInputs
from tokenprune_adapters.llava.vision import TowerReads, TowerRun
from tokenprune_adapters.segmentation.sam_masks import MaskSizes

SHOWN = 3  # masks, texts and batch rows that printing a result shows
WIDTH = 80  # characters of a text that it shows


class Prepared(Protocol):
    """An image in pixels, before any tower."""

    @property
    def sizes(self) -> MaskSizes:
        """How masks get back to the image."""


class Encoded(Protocol):
    """An image as far as it depends on nothing else. N image tokens, H decoder width."""

    @property
    def prepared(self) -> Prepared:
        """What went in."""

    @property
    def tower(self) -> TowerReads:
        """The tower's run."""

    @property
    def image_embeddings(self) -> Tensor:
        """[1, N, H]: what the decoder gets."""

    @property
    def image_valid(self) -> Tensor | None:
        """bool [1, N], False where an image token shows padding only and is masked; None where all count."""


@dataclass(frozen=True)
class PreparedImage:
    """An image as a CLIP tower and SAM's encoder want it.

    Args:
        clip_pixels: float32 [1, 3, h, w].
        sam_pixels: float32 [1, 3, square, square].
        sizes: how masks get back to the image.
    """

    clip_pixels: Tensor
    sam_pixels: Tensor
    sizes: MaskSizes


@dataclass(frozen=True)
class EncodedImage:
    """An image after a CLIP tower and SAM's encoder. N image tokens, C tower width, H decoder width.

    Args:
        prepared: what went in.
        tower: the tower's run; `tower.features` are [1, N, C], before the projector.
        image_embeddings: [1, N, H], after the projector: what the decoder gets.
        sam_embedding: [1, channels, grid, grid].
        image_valid: None: every image token counts.
    """

    prepared: PreparedImage
    tower: TowerRun
    image_embeddings: Tensor
    sam_embedding: Tensor
    image_valid: Tensor | None = None


@dataclass(frozen=True)
class SegmenterInputs:
    """Prompts about one image, ready for the decoder.

    Args:
        prompts: the whole texts.
        encoded: the image, as the model's `encode_image` gave it.
        sequence: what the decoder gets.
        texts: what each prompt asks, by wording: "question" and "query", see `ClipTextEmbeddings`.
    """

    prompts: list[str]
    encoded: Any
    sequence: DecoderInputs
    texts: Mapping[str, list[list[str]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Answered:
    """What the decoder said about B prompts, and the states that n masks are made from.

    Args:
        states: [n · g, H], final-norm states of the mask queries, the g of a mask in a row.
        rows: batch row of each mask.
        places: for each mask, index in `said[row]` of its first mask token.
        said: B rows of ids: the whole given sequence (image tokens expanded), or the generated answer.
        trace: what the strategy, or a context around the call, did; None without any.
    """

    states: Tensor
    rows: list[int]
    places: list[int]
    said: list[list[int]]
    trace: Trace | None


@dataclass(frozen=True, repr=False)
class Segmentation:
    """Masks for the queries about one image: one per [SEG], in order of the queries. n masks, the image is W×H.

    Args:
        masks: bool [n, H, W].
        mask_logits: float32 [n, H, W]; a mask is where they are above 0.
        low_res_logits: [n, h, w], what the mask decoder gives, over its padded square input.
        iou_predictions: [n], SAM's own estimate of each mask's quality, which these models do not train; empty for a
            mask decoder without one.
        text: the answer, a string for a single query or prompt, else one for each. Given answers are returned as they
            are.
        query_index: for each mask the query that it belongs to. With generated answers a query may get no mask, or
            several.
        trace: what the strategy, or a context around the call, did, see `tokenprune.prune`; None without any.
        row_index: for each mask the batch row of `trace` that it was made in.
    """

    masks: Tensor
    mask_logits: Tensor
    low_res_logits: Tensor
    iou_predictions: Tensor
    text: str | list[str]
    query_index: list[int]
    trace: Trace | None = None
    row_index: list[int] = field(default_factory=list)

    def __repr__(self) -> str:
        """How many masks of which size, the text, the tokens, and where they are: a few lines, no tensors."""
        return "\n  ".join((f"{type(self).__name__}:", *self.lines()))

    def lines(self) -> list[str]:
        """What `print` shows, line by line."""
        shares = ", ".join(f"{float(mask.float().mean()):.1%}" for mask in self.masks[:SHOWN])
        covering = f", covering {shares}{', …' if len(self.masks) > SHOWN else ''} of the image" if shares else ""
        rows = sorted(set(self.row_index)) or [0]
        tokens = [] if self.trace is None else [f"row {row}: {self.trace.summary(row)}" for row in rows[:SHOWN]]
        if len(rows) > SHOWN:
            tokens += ["…"] * bool(tokens)
        size = f"[{', '.join(map(str, self.masks.shape))}]"
        return [
            f".masks: bool {size}{covering}; .mask_logits as large, .low_res_logits {list(self.low_res_logits.shape)}",
            f".text: {short(self.text)}",
            *(f".trace: {line}" for line in tokens or ["None, nothing was pruned"]),
        ]


def short(texts: str | list[str]) -> str:
    """A text, or the first of several, each cut to what a line holds."""
    if isinstance(texts, str):
        return repr(texts if len(texts) <= WIDTH else f"{texts[: WIDTH - 1]}…")
    more = ", …" if len(texts) > SHOWN else ""
    return f"[{', '.join(short(text) for text in texts[:SHOWN])}{more}]"
