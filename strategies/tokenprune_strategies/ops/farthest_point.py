"""Farthest-first selection: rows that are as unlike each other as can be."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tokenprune.core.tokens import Tokens
from tokenprune_strategies.ops.allocation import apportion, images_of


def image_groups(tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """The active tokens of every image of the batch, and what each image may keep of its row's target.

    Returns rows int64 [G], token numbers int64 [G, n] padded with −1, shares int64 [G]; a row shares its target out by
    its images' sizes.
    """
    rows, members, shares = [], [], []
    for row, target in enumerate(tokens.target.tolist()):
        images = [image[tokens.active[row, image]] for image in images_of(tokens, row)]
        rows += [row] * len(images)
        members += images
        shares += apportion(target, [len(image) for image in images])
    if not members:
        return tokens.counts[:0], tokens.image[:0], tokens.counts[:0]
    index = pad_sequence(members, batch_first=True, padding_value=-1)
    return index.new_tensor(rows), index, index.new_tensor(shares)


def farthest_first(states: Tensor, exists: Tensor, count: Tensor, *, repeats: bool = False) -> Tensor:
    """The picks of every group in picking order, int64 [G, max count], padded with −1.

    Distance is 1 − cosine similarity in float32. The first pick is the row farthest from its nearest other row, every
    next one the row farthest from its nearest pick (max-min). One [G, n, n] matrix is held; a pick costs O(n).

    Args:
        states: [G, n, width].
        exists: bool [G, n].
        count: int64 [G], picks; at most the rows that exist.
        repeats: whether a picked row may be picked again, where every other row is a copy of a picked one too.
    """
    groups = torch.arange(len(states), device=states.device)
    rows = torch.nn.functional.normalize(states.float(), dim=-1)
    distance = torch.bmm(rows, rows.transpose(1, 2)).neg_().add_(1).masked_fill_(~exists[:, None], float("inf"))
    own = distance.diagonal(dim1=1, dim2=2)
    kept, most = own.clone(), int(count.max()) if count.numel() else 0
    own.fill_(float("inf"))
    reach = distance.amin(2)  # to the nearest other row, then to the nearest pick
    own.copy_(kept)
    taken, picks = ~exists, []
    for step in range(most):
        pick = reach.masked_fill(taken, float("-inf")).argmax(1)
        picks.append(torch.where(step < count, pick, -1))
        reach = distance[groups, pick] if step == 0 else torch.minimum(reach, distance[groups, pick])
        if not repeats:
            taken = taken.scatter(1, pick[:, None], True)
    return torch.stack(picks, 1) if picks else count.new_zeros(len(states), 0)


def picked(tokens: Tokens, rows: Tensor, index: Tensor, picks: Tensor) -> Tensor:
    """bool [batch, N] that is True at the picks; `rows` and `index` as `image_groups` gives them."""
    chosen = torch.zeros_like(tokens.exists)
    for row, members, numbers in zip(rows.tolist(), index, picks, strict=True):
        chosen[row, members[numbers[numbers >= 0]]] = True
    return chosen
