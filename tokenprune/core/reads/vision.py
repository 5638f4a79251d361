"""Reads of the vision side, which adapters provide.

Examples:
    [CLS] attention of two tower layers in one stage, where `tokens.read` tells them apart:

    >>> import tokenprune as tp
    >>> shallow, deep = tp.ClsAttention(5), tp.ClsAttention(-2)
    >>> len(tp.Stage("select", layer=0, reads=(shallow, deep)).reads), shallow.field == deep.field
    (2, True)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from tokenprune.core.reads.base import Read
from tokenprune.errors import InputError, PluginError


@dataclass(frozen=True)
class TowerFeatures(Read):
    """`tokens.features`: [batch, N, C], the vision tower's output, the input of the projector.

    If several patches become one image token, the value is their mean, here and in the other reads of the tower (ours).
    """

    field: ClassVar[str] = "features"


@dataclass(frozen=True)
class ClsAttention(Read):
    """`tokens.cls_attention`: float32 [batch, N], [CLS] attention to the patches in a tower layer.

    Towers without a [CLS] do not provide it (see `shape.offers(ClsAttention)`), but `ReceivedAttention`.

    Attributes:
        layer: tower layer, negative from the end; −1 is the last.
        heads: "mean" over each head's softmax over [CLS] and patches, or "joint": one softmax at full width, the heads
            not split (as PruMerge does).
    """

    field: ClassVar[str] = "cls_attention"
    layer: int = -1
    heads: Literal["mean", "joint"] = "mean"


@dataclass(frozen=True)
class ReceivedAttention(Read):
    """`tokens.received_attention`: float32 [batch, N], attention that a patch receives in a tower layer, mean over
    heads (each a softmax) and over all query positions."""

    field: ClassVar[str] = "received_attention"
    layer: int = -1


@dataclass(frozen=True)
class ClsFeatures(Read):
    """`tokens.cls_features`: [batch, N, C], the [CLS] row of each token's crop, in the states that `TowerFeatures` are
    taken from; a possible input of the projector."""

    field: ClassVar[str] = "cls_features"
    needs: ClassVar[str] = "a vision tower with a [CLS], and a projector that takes its row like a patch's"


@dataclass(frozen=True)
class ClsQuery(Read):
    """`tokens.cls_query`: float32 [batch, N, C], the query of [CLS] of each token's crop in a tower layer, as
    projected, heads concatenated."""

    field: ClassVar[str] = "cls_query"
    needs: ClassVar[str] = "a vision tower with a [CLS]"
    layer: int = -1


@dataclass(frozen=True)
class Crops(Read):
    """`tokens.crops`: int64 [batch, N], the crop of the tower's input that each token is from. One image may consist
    of several crops (tiles)."""

    field: ClassVar[str] = "crops"


@dataclass(frozen=True)
class TowerKeys(Read):
    """`tokens.keys`: float32 [batch, N, C], the patches' keys in a tower layer.

    Attributes:
        layer: tower layer, negative from the end.
        heads: "joint" concatenates the heads, "mean" averages them (C is the head size then).
    """

    field: ClassVar[str] = "keys"
    layer: int = -1
    heads: Literal["joint", "mean"] = "joint"


@dataclass(frozen=True)
class TowerValues(Read):
    """`tokens.values`: float32 [batch, N, C], the patches' values in a tower layer, heads concatenated."""

    field: ClassVar[str] = "values"
    layer: int = -1


@dataclass(frozen=True)
class TowerStates(Read):
    """`tokens.tower_states`: float32 [batch, N, C], the patches' states in the vision tower, mean over several layers.

    State 0 enters the tower's first layer, state i leaves the i-th, and state n the last of n layers, before any norm
    that follows it.

    Attributes:
        first: the first state of the mean: an int is its number, negative from the end (−1 is state n); a float
            between 0 and 1 is a share of the tower's depth (2 / 3 is state 16 of 24).
        last: the last one, which is included.

    Raises:
        PluginError: a float that is not between 0 and 1.
    """

    field: ClassVar[str] = "tower_states"
    first: int | float = -1
    last: int | float = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        for state in (self.first, self.last):
            if isinstance(state, float) and not 0 < state < 1:
                raise PluginError(f"TowerStates: {state:g} is not a share between 0 and 1; use an int for a number")

    def numbers(self, layers: int) -> range:
        """The states of a tower with so many layers, 0 … layers. Raises InputError if it does not have them."""
        first, last = (
            int(state * layers + 0.5) if isinstance(state, float) else state + (layers + 1) * (state < 0)
            for state in (self.first, self.last)
        )
        if not 0 <= first <= last <= layers:
            raise InputError(
                f"tower states {self.first:g} to {self.last:g} were requested, but the vision tower has {layers} "
                f"layers, states 0 … {layers}"
            )
        return range(first, last + 1)


_WHOLE_CLIP = (
    "a vision tower whose folder holds the whole CLIP model: text tower, both projections and the tokenizer's files"
)


@dataclass(frozen=True)
class ClipImageEmbeddings(Read):
    """`tokens.clip_image_embeddings`: float32 [batch, N, P], the image tokens in the space that CLIP's image and text
    embeddings share: post layer norm and visual projection of the patch rows that `TowerFeatures` are taken from."""

    field: ClassVar[str] = "clip_image_embeddings"
    needs: ClassVar[str] = _WHOLE_CLIP


@dataclass(frozen=True)
class ClipTextEmbeddings(Read):
    """`tokens.clip_text_embeddings`: a pair, float32 [batch, M, P], the embeddings of each row's question by CLIP's
    text tower with projection, and bool [batch, M], which of the M exist.

    Attributes:
        wording: "question": the whole question to the model, with its template; "query": only the words of the user
            (the question if a whole prompt was given).
        cut: how to shorten a text that exceeds CLIP's context: "truncate" cuts it off, "segments" splits it into
            several texts, each embedded separately.
    """

    field: ClassVar[str] = "clip_text_embeddings"
    axis: ClassVar[int | None] = None
    needs: ClassVar[str] = _WHOLE_CLIP
    wording: str = "question"
    cut: Literal["truncate", "segments"] = "truncate"


@dataclass(frozen=True)
class Projector(Read):
    """`tokens.project(features)`: [batch, k, C] -> [batch, k, width], the model's own projector into the decoder.

    Provided if the projector processes the image tokens one by one.
    """

    field: ClassVar[str] = "project"
    axis: ClassVar[int | None] = None


@dataclass(frozen=True)
class Pixels(Read):
    """`tokens.pixels`: uint8 [batch, H, W, 3], the picture that the tower's grid divides (after its crop)."""

    field: ClassVar[str] = "pixels"
    axis: ClassVar[int | None] = None
