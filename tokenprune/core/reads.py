"""What a stage can read. A stage declares the reads that it requires; the model declares those that it provides.

Example:
    A read with options is an object with arguments; its value is an attribute of `Tokens`, here `tokens.attention`:

    >>> import tokenprune as tp
    >>> tp.Stage("prune", layer=2, tokens=64, reads=(tp.AttentionFrom("last", reduce="max"),)).reads[0].field
    'attention'
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from tokenprune.utils.arguments import check_literals


@dataclass(frozen=True)
class Read:
    """One input of a stage's choice.

    Attributes:
        field: the attribute of `Tokens` that holds the value.
        needs: what a model must have to provide it, for the error message.
        axis: the axis of the value that indexes image tokens; None if there is none.
        present: whether the value describes the token as it is now; else the original token of that number.
        missing: the value at tokens that a row does not have.

    Raises:
        PluginError: an attribute annotated as a `Literal` has a value that is not listed there.
    """

    field: ClassVar[str]
    needs: ClassVar[str] = ""
    axis: ClassVar[int | None] = 1
    present: ClassVar[bool] = False
    missing: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        check_literals(self)

    def __str__(self) -> str:
        return type(self).__name__

    @property
    def looks_back(self) -> bool:
        """Whether the layer just before the stage is read, which a stage at layer 0 does not have."""
        return False


@dataclass(frozen=True)
class AttentionFrom(Read):
    """Attention that query rows pay to the image tokens.

    `tokens.attention` is float32 [batch, N]: softmax over all keys of that layer (text too), mean over heads, then
    `reduce` over the query rows; −inf where a token was not active, which ranks it last. With heads or
    query rows kept separate it is [batch, heads, N], [batch, Q, N] or [batch, heads, Q, N]; where a batch row has fewer
    query rows than Q, the missing ones hold zeros.

    Attributes:
        query: "mask_query" (the position whose state becomes the mask; the last position if there is none),
            "seg", "last", or any row that the caller or the strategy (`tokens.mark`) marked.
        reduce: "mean" or "max" over several query rows; "each" keeps them separate.
        heads: "mean"; "each" keeps them separate.
        layer: "before": the decoder layer just before the stage. "next": the stage's own first layer, whose queries and
            keys are computed ahead from the states that enter the stage, at their present positions (PyramidDrop).
    """

    field: ClassVar[str] = "attention"
    axis: ClassVar[int | None] = -1
    present: ClassVar[bool] = True
    missing: ClassVar[float] = float("-inf")
    query: str = "mask_query"
    reduce: Literal["mean", "max", "each"] = "mean"
    heads: Literal["mean", "each"] = "mean"
    layer: Literal["before", "next"] = "before"

    @property
    def looks_back(self) -> bool:
        """Unless it is computed ahead."""
        return self.layer == "before"


@dataclass(frozen=True)
class PositionKernel(Read):
    """`tokens.position_kernel`: float32 [batch, Q, N], the rotary embedding's part of the attention scores:
    the scaled product of all-ones queries and keys after rotation, at their present positions (SparseVLM+)."""

    field: ClassVar[str] = "position_kernel"
    needs: ClassVar[str] = "a rotary embedding of one axis"
    axis: ClassVar[int | None] = -1
    present: ClassVar[bool] = True
    query: str = "mask_query"


@dataclass(frozen=True)
class HiddenStates(Read):
    """`tokens.hidden`: [batch, N, width], the state of every image token on entering the stage; of a parked token
    its last state.

    Attributes:
        normed: passed through the decoder's final norm.
    """

    field: ClassVar[str] = "hidden"
    present: ClassVar[bool] = True
    normed: bool = False


@dataclass(frozen=True)
class TextStates(Read):
    """`tokens.text_hidden`: [batch, T, width], states of the text tokens on entering the stage (see `tokens.text`).

    Attributes:
        normed: passed through the decoder's final norm.
    """

    field: ClassVar[str] = "text_hidden"
    axis: ClassVar[int | None] = None
    normed: bool = False


@dataclass(frozen=True)
class LayerKeys(Read):
    """`tokens.layer_keys`: [batch, N, C], keys in the decoder layer just before the stage, after the rotary embedding
    at positions counted from the row's first token, whatever padding stands before it; zeros where a token was not
    active.

    Attributes:
        heads: "joint" concatenates the key heads, "mean" averages them (C is the head size then).
    """

    field: ClassVar[str] = "layer_keys"
    present: ClassVar[bool] = True
    looks_back: ClassVar[bool] = True
    heads: Literal["joint", "mean"] = "joint"


@dataclass(frozen=True)
class TextKeys(Read):
    """`tokens.text_keys`: [batch, T, C], as `LayerKeys`, of the text tokens."""

    field: ClassVar[str] = "text_keys"
    axis: ClassVar[int | None] = None
    looks_back: ClassVar[bool] = True


@dataclass(frozen=True)
class TextEmbeddings(Read):
    """`tokens.text_embeddings`: [batch, T, width], the text tokens as they entered the decoder."""

    field: ClassVar[str] = "text_embeddings"
    axis: ClassVar[int | None] = None


@dataclass(frozen=True)
class Embeddings(Read):
    """`tokens.embeddings`: [batch, N, width], the image tokens as they entered the decoder, after the changes of stages
    before its first layer."""

    field: ClassVar[str] = "embeddings"
    present: ClassVar[bool] = True


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
