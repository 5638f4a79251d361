"""PruneSID's tensor operations: groups of patches, suppression of similar ones, quotas of groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from tokenprune.utils.host_copies import on_host


@dataclass(frozen=True, eq=False)
class Patches:
    """What is chosen from in a crop of n patches.

    Attributes:
        groups: int64 [n], the group of each patch.
        order: int64 [n], patches by falling attention.
        similar: bool [n, n], which pairs are too similar to be kept both.
    """

    groups: Tensor
    order: Tensor
    similar: Tensor

    @classmethod
    def on_host(cls, crops: Sequence[Patches]) -> list[Patches]:
        """Those of several crops in the host's memory, in one copy."""
        found = iter(on_host(*(part for crop in crops for part in (crop.groups, crop.order, crop.similar))))
        return [cls(next(found), next(found), next(found)) for _ in crops]


def loadings(states: Tensor, groups: int, start: Tensor | None = None) -> Tensor:
    """float32 [n, groups]: how much each patch belongs to each of the first principal directions, which are the groups.

    They are the absolute values of the right singular vectors of the matrix of channels and patches, sigmoid(states)ᵀ,
    less each patch's mean.

    Args:
        states: [n, C], tower states of the patches.
        groups: number of directions; at most min(n, C).
        start: float32 [min(n, C), groups], from which two power iterations approximate the directions, as published;
            None = the exact ones, in falling order of the singular values.
    """
    matrix = states.float().sigmoid().nan_to_num().T
    matrix = matrix - matrix.mean(0)
    if start is None:  # eigenvectors of the patches' products, in double precision since that squares the values
        products = matrix.T.double() @ matrix.double()
        directions: Tensor = torch.linalg.eigh(products).eigenvectors[:, -groups:]
        return directions.flip(1).abs().float()
    by_patch = len(matrix) >= matrix.shape[1]
    tall = matrix if by_patch else matrix.T
    basis = torch.linalg.qr(tall @ start).Q
    for _ in range(2):
        basis = torch.linalg.qr(tall.T @ basis).Q
        basis = torch.linalg.qr(tall @ basis).Q
    left, _, right = torch.linalg.svd(basis.T @ tall, full_matrices=False)
    directions = right.T if by_patch else basis @ left
    return directions.abs()


def threshold(likeness: Tensor, total: int) -> Tensor:
    """float32 []: the similarity above which a patch is suppressed: the mean over all pairs, times total / 32.

    Args:
        likeness: float32 [n, n], cosine similarity of the patches.
        total: tokens to keep, [CLS] included.
    """
    pairs = max(1, len(likeness) * (len(likeness) - 1) // 2)
    return likeness.triu(1).sum() / pairs * (total / 32)


def unsuppressed(patches: Patches) -> Tensor:
    """bool [n]: the patches that remain if, in each group, the most attended one suppresses those similar to it, then
    the most attended one of the rest, and so on."""
    suppresses = (patches.similar & (patches.groups[:, None] == patches.groups)).numpy()
    gone, remains = torch.zeros(2, len(suppresses), dtype=torch.bool).numpy()
    for patch in patches.order.tolist():
        if not gone[patch]:
            remains[patch] = True
            gone |= suppresses[patch]
    return torch.from_numpy(remains)


def quotas(counts: Tensor, sizes: Tensor, total: int) -> Tensor:
    """int64 [groups]: patches to keep of each group, total − 1 of them.

    Args:
        counts: int64 [groups], patches of each group that remain after suppression.
        sizes: int64 [groups], all its patches.
        total: tokens to keep, [CLS] included; more than there are groups with patches, at most the sum of sizes.
    """
    least = sizes.clamp(max=1)
    most = sizes.minimum(counts).clamp(max=5 * ceil(total / 64))
    while int(most.sum()) < total:
        most = (most + 1).minimum(sizes)
    free = max(0, total - int(least.sum()) - 1)
    # in float32, whose rounding decides where a share ends in a half
    shares = ((counts.float() / counts.sum()).cumsum(0) * free).round().long()
    found = (shares.diff(prepend=shares.new_zeros(1)) + least).minimum(most)
    rest = free + int(least.sum()) - int(found.sum())
    for group in counts.argsort(descending=True, stable=True).tolist():  # fill groups up, those of most patches first
        more = min(rest, int(most[group] - found[group]))
        found[group] += more
        rest -= more
    return found


def selected(patches: Patches, total: int) -> Tensor:
    """int64 [total − 1]: the patches that are kept, group by group.

    Of each group come first those that are not suppressed, by falling attention, then the others.

    Args:
        patches: of the crop, in the host's memory.
        total: tokens to keep, [CLS] included.
    """
    groups, order, remains = patches.groups, patches.order, unsuppressed(patches)
    number = int(groups.max()) + 1
    own = quotas(groups[remains].bincount(minlength=number), groups.bincount(minlength=number), total)
    ranked = torch.cat((order[remains[order]], order[~remains[order]]))
    return torch.cat([ranked[groups[ranked] == group][:count] for group, count in enumerate(own.tolist())])
