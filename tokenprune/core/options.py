"""Types of options that many methods have: numbers of tokens, depths, how query rows are reduced."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator

from tokenprune.errors import OptionError


def _checked(amount: int | float) -> int | float:
    if isinstance(amount, int) and amount < 1:
        raise ValueError("a whole number of tokens must be at least 1")
    if isinstance(amount, float) and not 0 < amount <= 1:
        raise ValueError("a share of the image tokens must be in (0, 1]")
    return amount


Amount = Annotated[int | float, AfterValidator(_checked)]
"""Tokens of a batch row: an int counts them, a float is a share of the row's image tokens (1.0 = all, 1 = one)."""


def _checked_depth(depth: int | float) -> int | float:
    if isinstance(depth, int) and depth < 1:
        raise ValueError("a layer must be at least 1")
    if isinstance(depth, float) and not 0 < depth < 1:
        raise ValueError("a fraction of the depth must be in (0, 1)")
    return depth


Depth = Annotated[int | float, AfterValidator(_checked_depth)]
"""A decoder layer: an int is its number, a float a fraction of the model's depth."""


def layer_of(layer: int | float, layers: int, who: str, *, least: int = 0) -> int:
    """The decoder layer that the option `layer` names.

    Args:
        layer: its number, or a fraction of the depth, which is rounded to the nearest layer that is allowed.
        layers: of the model.
        who: name of the strategy, for the message.
        least: the lowest allowed layer, for the message.

    Raises:
        OptionError: the model has no such layer.
    """
    if isinstance(layer, float):
        layer = max(least, min(int(layer * layers + 0.5), layers - 1))
    if layer >= layers:
        raise OptionError(
            f"strategy {who!r}: option 'layer': found {layer}, but the model has {layers} layers; "
            f"choose one of {least} … {layers - 1}"
        )
    return layer


QUERY = 'query row whose attention is used: "mask_query", "last", "seg", …'
QueryReduce = Literal["mean", "max"]
"""How attention from several query rows of a batch row becomes one score: the rule that all strategies share (ours)."""
QUERY_REDUCE = "mean or max over several query rows of a batch row (one for each mask)"


def tokens_of(amount: int | float, total: int) -> int:
    """How many of `total` tokens an `Amount` means: at least 1 where there is any, never more than there are."""
    return min(max(1, amount if isinstance(amount, int) else portion(amount, total)), total)


def portion(share: float, total: int) -> int:
    """floor(share · total), allowing for rounding errors in a product that should be whole."""
    return int(share * total + 1e-6)


Wording = Literal["question", "query"]
"""See `tokenprune.core.reads.ClipTextEmbeddings`."""
WORDING = "text compared with the image: question (the whole question to the model) or query (the user's words)"

POSITIONS = "position policy: keep (original positions) or renumber (as if the prompt were shorter)"
"""Description of the option `positions` of methods whose authors keep them."""
COMPACT = "position policy: renumber (as in the authors' code) or keep (original positions)"
"""Description of the option `positions` of methods whose authors renumber."""
KEPT = "image tokens to keep: number (int) or share (float)"
"""Description of the option `keep` of most methods."""
