"""Reads of the decoder, which the engine provides.

Examples:
    Attention without the rotary embedding, of the layer before the stage, and the values of that layer:

    >>> import tokenprune as tp
    >>> reads = (tp.AttentionFrom("last", keys="image", rotary=False), tp.LayerValues("mean"))
    >>> [read.field for read in tp.Stage("prune", layer=8, reads=reads).reads]
    ['attention', 'layer_values']
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from tokenprune.core.reads.base import Read


@dataclass(frozen=True)
class AttentionFrom(Read):
    """Attention that query rows pay to the image tokens.

    `tokens.attention` is float32 [batch, N]: softmax over the keys of that layer, in each head, mean over heads, then
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
        keys: "all": the softmax is over all keys that the row sees, text too. "image": over the image tokens alone, so
            that each head weighs as much as the others (FEATHER).
        rotary: False: of queries and keys without the rotary embedding, which favours tokens near the query (FEATHER);
            in a later turn of a conversation among its own tokens, since cached keys are rotated.
            They are computed ahead of the layer that is read.
    """

    field: ClassVar[str] = "attention"
    axis: ClassVar[int | None] = -1
    present: ClassVar[bool] = True
    missing: ClassVar[float] = float("-inf")
    infinite: ClassVar[bool] = True
    query: str = "mask_query"
    reduce: Literal["mean", "max", "each"] = "mean"
    heads: Literal["mean", "each"] = "mean"
    layer: Literal["before", "next"] = "before"
    keys: Literal["all", "image"] = "all"
    rotary: bool = True

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
    at positions counted from the row's first token (of the turn, in a conversation), whatever padding stands before
    it; zeros where a token was not active.

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
class LayerValues(Read):
    """`tokens.layer_values`: [batch, N, C], values in the decoder layer just before the stage; zeros where a token was
    not active.

    Attributes:
        heads: "joint" concatenates the value heads, "mean" averages them (C is the head size then), "each" keeps them
            separate: [batch, N, heads, C].
    """

    field: ClassVar[str] = "layer_values"
    present: ClassVar[bool] = True
    looks_back: ClassVar[bool] = True
    heads: Literal["joint", "mean", "each"] = "joint"


@dataclass(frozen=True)
class TextValues(Read):
    """`tokens.text_values`: [batch, T, C] or [batch, T, heads, C], as `LayerValues`, of the text tokens."""

    field: ClassVar[str] = "text_values"
    axis: ClassVar[int | None] = None
    looks_back: ClassVar[bool] = True
    heads: Literal["joint", "mean", "each"] = "joint"


@dataclass(frozen=True)
class RotaryTables(Read):
    """`tokens.rotary_tables`: float32 [batch, N, axes, 2, C], cos and sin of the rotary embedding at each token's
    present position, counted from the row's first token; zeros where a token is not active.

    A model has one axis, or several, such as time, height and width (M-RoPE). If it joins them into one table, by using
    each for some of the channels, this read has all channels of each.
    """

    field: ClassVar[str] = "rotary_tables"
    present: ClassVar[bool] = True


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
