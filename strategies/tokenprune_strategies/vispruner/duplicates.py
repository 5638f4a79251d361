"""VisPruner's removal of duplicates, and the numbers that the authors' code cannot keep."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenprune.core.tokens import ImageTokens
from tokenprune.errors import OptionError

ROUND = 8  # tokens that the authors remove at a time


def distinct(likeness: Tensor, rest: Tensor, count: int) -> Tensor:
    """The `count` of `rest` that remain when duplicates are removed, int64 [count].

    Args:
        likeness: float [n, n], cosine similarity of an image's n tokens.
        rest: int64 [R], the tokens to choose from, by descending attention.
        count: number to keep; at most R.
    """
    if count == 0:
        return rest[:0]
    while len(rest) > count:
        # the tokens at even places are compared with those at odd ones; the most similar to any of them are removed
        ours, others = rest[::2], rest[1::2]
        similar = likeness[ours[:, None], others].amax(1)
        gone = min(ROUND, len(rest) - count, len(ours))
        # the order, by descending similarity, decides which places are even in the next round
        rest = torch.cat((ours[similar.argsort(descending=True, stable=True)[gone:]], others))
    return rest


def kept_by_authors(rest: int, count: int) -> int | None:
    """How many of `rest` tokens the authors' code keeps in place of `count`; None if it stops with an error.

    Their index of the tokens that survive a round has rest // 2 rows, where with an odd number of tokens one more is
    compared; and 8 are removed where fewer are compared.
    """
    while rest > count > 0:
        room = rest // 2 - min(ROUND, rest - count)
        if room < -1 or (rest % 2 and room > 1):
            return None
        # an index of one row is repeated for two tokens, and one of no row drops the token that should survive
        survive = 2 if rest % 2 and room == 1 else max(0, room)
        rest = rest // 2 + survive
    return rest if count else 0


def check_authors_keep(crop: ImageTokens, rest: int, count: int) -> None:
    """Raise OptionError where the authors' code does not keep `count` of a crop's `rest` unimportant tokens."""
    kept = kept_by_authors(rest, count)
    if kept != count:
        found = "stops with an error" if kept is None else f"keeps {crop.quota - count + kept}"
        raise OptionError(
            f"strategy 'vispruner': option 'faithful': to keep {crop.quota} of an image's {len(crop)} tokens the "
            f"authors' code {found}; choose another 'keep' or 'important', or faithful=False"
        )
