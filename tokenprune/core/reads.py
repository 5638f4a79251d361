"""What a stage may read. A stage declares its reads; the model's side declares what it can provide.

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
    """One thing that a stage wants to see before it chooses.

    Attributes:
        field: names the attribute of `Tokens` that holds it.
        needs: what a model must have to offer it, for the message that refuses a model without it.
        axis: axis of the value that runs over the image tokens, None where none does.
        present: whether it tells of what an image token is now; else of the original token of that number.
        missing: what the value holds for tokens that a row does not have.

    Raises:
        PluginError: an attribute that is none of the values which its type, a `Literal`, names.
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
    `reduce` over the query rows; −inf where a token was not active, so that it is never among the highest. With heads
    or query rows kept apart it is [batch, heads, N], [batch, Q, N] or [batch, heads, Q, N]; where a batch row has fewer
    query rows than Q, the missing ones hold zeros.

    Attributes:
        query: "mask_query" (the position whose state becomes the mask; the last position where there is none),
            "seg", "last", any row that the caller marked, or that the strategy did (`tokens.mark`).
        reduce: "mean" or "max" over several query rows; "each" keeps them apart.
        heads: "mean"; "each" keeps them apart.
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
    """`tokens.position_kernel`: float32 [batch, Q, N], what the rotary embedding alone makes of query rows and tokens:
    the scaled product of all-ones queries and keys after rotation, at their present positions (SparseVLM+)."""

    field: ClassVar[str] = "position_kernel"
    needs: ClassVar[str] = "a rotary embedding of one axis"
    axis: ClassVar[int | None] = -1
    present: ClassVar[bool] = True
    query: str = "mask_query"


@dataclass(frozen=True)
class HiddenStates(Read):
    """`tokens.hidden`: [batch, N, width], the state of every image token on entering the stage; the last one it had
    if parked.

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
    """`tokens.text_keys`: [batch, T, C], the same of the text tokens."""

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
    """`tokens.embeddings`: [batch, N, width], the image tokens as they entered the decoder, with all that stages before
    its first layer made of them."""

    field: ClassVar[str] = "embeddings"
    present: ClassVar[bool] = True


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
    heads: Literal["mean", "joint"] = "mean"


@dataclass(frozen=True)
class ReceivedAttention(Read):
    """`tokens.received_attention`: float32 [batch, N], attention that a patch receives in a tower layer, mean over
    heads and over everything that attends (each head a softmax)."""

    field: ClassVar[str] = "received_attention"
    layer: int = -1


@dataclass(frozen=True)
class ClsFeatures(Read):
    """`tokens.cls_features`: [batch, N, C], the [CLS] row of each token's crop, in the states that `TowerFeatures` are
    taken from: something that the projector could take as well."""

    field: ClassVar[str] = "cls_features"
    needs: ClassVar[str] = "a vision tower with a [CLS], and a projector that takes its row like a patch's"


@dataclass(frozen=True)
class ClsQuery(Read):
    """`tokens.cls_query`: float32 [batch, N, C], the query of [CLS] in a tower layer, of each token's crop, heads
    concatenated, as the projection gives it."""

    field: ClassVar[str] = "cls_query"
    needs: ClassVar[str] = "a vision tower with a [CLS]"
    layer: int = -1


@dataclass(frozen=True)
class Crops(Read):
    """`tokens.crops`: int64 [batch, N], the crop that the tower saw each token in. Crops of one image differ; several
    of them may make up one image, as tiles do."""

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
    """`tokens.clip_text_embeddings`: a pair, float32 [batch, M, P] and bool [batch, M]: what was asked in each row, by
    CLIP's text tower with projection, and which of the M exist.

    Attributes:
        wording: "question": the whole question that the model is asked, its template included; "query": only the
            words that the user gave (the question where a whole prompt was given).
        cut: what becomes of a text that is longer than CLIP's context: "truncate" ends it there, "segments" cuts it
            into several, each embedded on its own.
    """

    field: ClassVar[str] = "clip_text_embeddings"
    axis: ClassVar[int | None] = None
    needs: ClassVar[str] = _WHOLE_CLIP
    wording: str = "question"
    cut: Literal["truncate", "segments"] = "truncate"


@dataclass(frozen=True)
class Projector(Read):
    """`tokens.project(features)`: [batch, k, C] -> [batch, k, width], the model's own projector into the decoder.

    Offered where the projector takes the image tokens one by one.
    """

    field: ClassVar[str] = "project"
    axis: ClassVar[int | None] = None


@dataclass(frozen=True)
class Pixels(Read):
    """`tokens.pixels`: uint8 [batch, H, W, 3], the picture exactly as the tower's grid divides it (after its crop)."""

    field: ClassVar[str] = "pixels"
    axis: ClassVar[int | None] = None
