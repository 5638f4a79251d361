"""Inputs and results of segmentation models, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from tokenprune.core.trace import Trace
from tokenprune_adapters.llava.prompt import DecoderInputs
from tokenprune_adapters.llava.vision import TowerReads, TowerRun
from tokenprune_adapters.segmentation.sam.masks import MaskSizes

SHOWN = 3  # masks, texts and batch rows in the repr of a result
WIDTH = 80  # characters of a text in it


class Prepared(Protocol):
    """An image in pixels, before any tower."""

    @property
    def sizes(self) -> MaskSizes:
        """Sizes for resizing masks to the image."""


class Encoded(Protocol):
    """An image after the towers, independent of queries. N image tokens, H decoder width."""

    @property
    def prepared(self) -> Prepared:
        """The image in pixels."""

    @property
    def tower(self) -> TowerReads:
        """The tower's result."""

    @property
    def image_embeddings(self) -> Tensor:
        """[1, N, H]: the decoder's image tokens."""

    @property
    def image_valid(self) -> Tensor | None:
        """bool [1, N], False for image tokens that show only padding and are masked; None = none are masked."""


@dataclass(frozen=True)
class PreparedImage:
    """The inputs of a CLIP tower and SAM's encoder for one image.

    Args:
        clip_pixels: float32 [1, 3, h, w].
        sam_pixels: float32 [1, 3, square, square].
        sizes: sizes for resizing masks to the image.
    """

    clip_pixels: Tensor
    sam_pixels: Tensor
    sizes: MaskSizes


@dataclass(frozen=True)
class EncodedImage:
    """An image after a CLIP tower and SAM's encoder. N image tokens, C tower width, H decoder width.

    Args:
        prepared: the image in pixels.
        tower: the tower's result; `tower.features` are [1, N, C], before the projector.
        image_embeddings: [1, N, H], after the projector: the decoder's image tokens.
        sam_embedding: [1, channels, grid, grid].
        image_valid: None = no image token is masked.
    """

    prepared: PreparedImage
    tower: TowerRun
    image_embeddings: Tensor
    sam_embedding: Tensor
    image_valid: Tensor | None = None


@dataclass(frozen=True)
class SegmenterInputs:
    """Prompts about one image, or about several, ready for the decoder.

    Args:
        prompts: the whole texts.
        encoded: the image, from the model's `encode_image`; None for prompts about several images.
        sequence: the decoder's inputs.
        texts: texts of each prompt by wording: "question" and "query", see `ClipTextEmbeddings`.
        templates: for each prompt, the text that it shares with prompts of the same kind; None = none is known.
        parts: for several images, the inputs about each, whose rows follow each other in `sequence`; see
            `segmentation.many.joined`.
    """

    prompts: list[str]
    encoded: Any
    sequence: DecoderInputs
    texts: Mapping[str, list[list[str]]] = field(default_factory=dict)
    templates: Sequence[str | None] = ()
    parts: tuple[SegmenterInputs, ...] = ()

    @property
    def by_image(self) -> tuple[SegmenterInputs, ...]:
        """The inputs about each image, in the order of their rows."""
        return self.parts or (self,)


@dataclass(frozen=True)
class Answered:
    """The decoder's answers to B prompts, and the states from which n masks are computed.

    Args:
        states: [n · g, H], final-norm states of the mask queries, of which g consecutive ones form a mask.
        rows: batch row of each mask.
        places: for each mask, index in `said[row]` of its first mask token.
        said: B rows of ids: the whole forced sequence (image tokens expanded), or the generated answer.
        trace: trace of the prefill, if it was pruned by a strategy or a surrounding context; else None.
    """

    states: Tensor
    rows: list[int]
    places: list[int]
    said: list[list[int]]
    trace: Trace | None


@dataclass(frozen=True, repr=False)
class Segmentation:
    """Masks for the queries about one image: one per [SEG], in the order of the queries. n masks, image of H×W pixels.

    Args:
        masks: bool [n, H, W], or of the size that `segment_many` was asked for.
        mask_logits: float32, of the same size; a pixel is in the mask if its logit is above 0. None if they were not
            kept, which `segment_many` does on request only.
        low_res_logits: [n, h, w], output of the mask decoder, over its padded square input.
        iou_predictions: [n], SAM's estimate of each mask's quality, which these models do not train; empty for a mask
            decoder without it.
        text: the answer: a string for a single query or prompt, else a list. Forced answers are included unchanged.
        query_index: the query of each mask. With generated answers, a query may have no mask or several.
        trace: trace of the prefill, if it was pruned by a strategy or a surrounding context; else None.
        row_index: the batch row of each mask in `trace`.
        prompt_rows: the batch row of each prompt in `trace`, of those without a mask too.
    """

    masks: Tensor
    mask_logits: Tensor | None
    low_res_logits: Tensor
    iou_predictions: Tensor
    text: str | list[str]
    query_index: list[int]
    trace: Trace | None = None
    row_index: list[int] = field(default_factory=list)
    prompt_rows: list[int] = field(default_factory=list)

    def __repr__(self) -> str:
        """Number and size of the masks, the text and the tokens, in a few lines without tensors."""
        return "\n  ".join((f"{type(self).__name__}:", *self.lines()))

    def lines(self) -> list[str]:
        """The lines of the repr."""
        shares = ", ".join(f"{int(mask.sum()) / max(mask.numel(), 1):.1%}" for mask in self.masks[:SHOWN])
        covering = f", covering {shares}{', …' if len(self.masks) > SHOWN else ''} of the image" if shares else ""
        rows = sorted({*self.row_index, *self.prompt_rows}) or [0]
        tokens = [] if self.trace is None else [f"row {row}: {self.trace.summary(row)}" for row in rows[:SHOWN]]
        if len(rows) > SHOWN:
            tokens += ["…"] * bool(tokens)
        size = f"[{', '.join(map(str, self.masks.shape))}]"
        logits = "" if self.mask_logits is None else ".mask_logits as large, "
        return [
            f".masks: bool {size}{covering}; {logits}.low_res_logits {list(self.low_res_logits.shape)}",
            f".text: {short(self.text)}",
            *(f".trace: {line}" for line in tokens or ["None, nothing was pruned"]),
        ]


def short(texts: str | list[str]) -> str:
    """A text, or the first ones of several, each truncated to a line."""
    if isinstance(texts, str):
        return repr(texts if len(texts) <= WIDTH else f"{texts[: WIDTH - 1]}…")
    more = ", …" if len(texts) > SHOWN else ""
    return f"[{', '.join(short(text) for text in texts[:SHOWN])}{more}]"
