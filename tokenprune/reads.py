"""What a stage may read. A stage declares its reads; the model's side declares what it can provide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Read:
    """One thing that a stage wants to see before it chooses. `field` names the attribute of `Tokens` that holds it."""

    field: ClassVar[str]

    def __str__(self) -> str:
        return type(self).__name__


@dataclass(frozen=True)
class AttentionFrom(Read):
    """Attention that query rows pay to the image tokens, in the decoder layer just before the stage.

    `tokens.attention` is float32 [batch, N]: softmax over all keys of that layer (text too), mean over heads, then
    `reduce` over the query rows; −inf where a token was not active, so that it is never among the highest.

    Attributes:
        query: "mask_query" (the position whose state becomes the mask; the last position where there is none),
            "seg", "last", or any row that the caller marked.
        reduce: "mean" or "max" over several query rows.
    """

    field: ClassVar[str] = "attention"
    query: str = "mask_query"
    reduce: str = "mean"


@dataclass(frozen=True)
class HiddenStates(Read):
    """`tokens.hidden`: [batch, N, width], the state of every image token on entering the stage; the last one it had
    if parked."""

    field: ClassVar[str] = "hidden"


@dataclass(frozen=True)
class Embeddings(Read):
    """`tokens.embeddings`: [batch, N, width], the image tokens as they entered the decoder."""

    field: ClassVar[str] = "embeddings"


@dataclass(frozen=True)
class TowerFeatures(Read):
    """`tokens.features`: [batch, N, C], what the vision tower gives to the projector.

    Where several patches become one image token, their mean; the same holds for the other reads of the tower (ours).
    """

    field: ClassVar[str] = "features"


@dataclass(frozen=True)
class ClsAttention(Read):
    """`tokens.cls_attention`: float32 [batch, N], [CLS] attention to the patches in a tower layer.

    Towers without a [CLS] do not offer it (`shape.offers(ClsAttention)`); `ReceivedAttention` is what they have.

    Attributes:
        layer: tower layer, negative from the end; −1 is the last.
        heads: "mean" over each head's softmax over [CLS] and patches, or "joint": one softmax at full width, the heads
            not split (as PruMerge does).
    """

    field: ClassVar[str] = "cls_attention"
    layer: int = -1
    heads: str = "mean"


@dataclass(frozen=True)
class ReceivedAttention(Read):
    """`tokens.received_attention`: float32 [batch, N], attention that a patch receives in a tower layer, mean over
    heads and over everything that attends (each head a softmax)."""

    field: ClassVar[str] = "received_attention"
    layer: int = -1


@dataclass(frozen=True)
class TowerKeys(Read):
    """`tokens.keys`: float32 [batch, N, C], the patches' keys in a tower layer, heads concatenated."""

    field: ClassVar[str] = "keys"
    layer: int = -1


@dataclass(frozen=True)
class Projector(Read):
    """`tokens.project(features)`: [batch, k, C] -> [batch, k, width], the model's own projector into the decoder.

    Offered where the projector takes the image tokens one by one.
    """

    field: ClassVar[str] = "project"


@dataclass(frozen=True)
class Pixels(Read):
    """`tokens.pixels`: uint8 [batch, H, W, 3], the picture exactly as the tower's grid divides it (after its crop)."""

    field: ClassVar[str] = "pixels"
