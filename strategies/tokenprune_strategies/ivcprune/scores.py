"""IVC-Prune's scores: similarity of values in the layer before the stage, and means of the rotary embedding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.core.tokens import ImageTokens, Tokens
from tokenprune.errors import OptionError
from tokenprune_strategies.ivcprune.numbers import seeds_of

BEHIND = 2  # text tokens behind the image that do not count: the image's end, and the one after


@dataclass(frozen=True, eq=False)
class ValueScores:
    """What the values of an image's n tokens say.

    Attributes:
        text: float32 [n], mean similarity to the text.
        seeds: int64 [m], the highest of them, falling.
        scores: float32 [n], mean similarity to text and seeds.
    """

    text: Tensor
    seeds: Tensor
    scores: Tensor


def text_after(tokens: Tokens, image: ImageTokens, *, faithful: bool) -> Tensor:
    """int64 [Q]: the text tokens behind an image, without the first two.

    Where there are no others, those two; behind an image at the end of the prompt, all text (ours).

    Raises:
        OptionError: there are none, and `faithful`: the authors' code then chooses by a mean over nothing.
    """
    text = tokens.on_host("text")[image.row]
    behind = text & (tokens.on_host("images_before")[image.row] > image.index_on_host[-1])
    found = behind.nonzero().flatten()
    if faithful and len(found) <= BEHIND:
        raise OptionError(
            f"strategy 'ivcprune': option 'faithful': found {len(found)} text tokens behind an image, and the authors' "
            f"code needs more than {BEHIND}; use faithful=False"
        )
    found = found[BEHIND:] if len(found) > BEHIND else found if len(found) else text.nonzero().flatten()
    return found.to(tokens.device, non_blocking=True)


def value_scores(tokens: Tokens, image: ImageTokens, text: Tensor, *, among_all: bool) -> ValueScores:
    """Scores of an image's tokens.

    Args:
        tokens: the tokens; the stage reads values of image and text tokens, heads apart.
        image: the image.
        text: int64 [Q], the text tokens that count.
        among_all: whether similarities are a softmax over all tokens of the row, without a causal mask; else over the
            image's.
    """
    row = image.row
    own, words = tokens.layer_values[row, image.index].float(), tokens.text_values[row]
    keys = own
    if among_all:
        # on the host, which knows where they are
        others = tokens.on_host("active")[row].index_fill(0, image.index_on_host, False).nonzero().flatten()
        every = tokens.on_host("text")[row].nonzero().flatten()
        others, every = (part.to(tokens.device, non_blocking=True) for part in (others, every))
        keys = torch.cat((own, tokens.layer_values[row, others].float(), words[every].float()))
    from_text = _similarity(words[text].float(), keys)[:, : len(own)]
    mean = from_text.sum(0) / max(1, len(text))
    seeds = mean.argsort(descending=True, stable=True)[: seeds_of(len(own))]
    from_seeds = _similarity(own[seeds], keys)[:, : len(own)]
    # one plain mean over the rows of text and seeds together
    return ValueScores(mean, seeds, torch.cat((from_text, from_seeds)).mean(0))


def coordinate_means(tables: Tensor) -> Tensor:
    """float32 [batch, N, 2]: means of cos and of sin over axes and channels, of rotary tables [batch, N, axes, 2, C].

    Axes are added by size, so that cells with height and width exchanged are equal, whatever the rounding.
    """
    return tables.mean(-1).sort(dim=2).values.mean(2)


def _similarity(queries: Tensor, keys: Tensor) -> Tensor:
    """float32 [Q, K]: softmax over the keys, mean over heads, of values [Q, heads, C] and [K, heads, C]."""
    logits: Tensor = torch.einsum("qhc,khc->hqk", queries, keys) / queries.shape[-1] ** 0.5
    return logits.softmax(-1).mean(0)
