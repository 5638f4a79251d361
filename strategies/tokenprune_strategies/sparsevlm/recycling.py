"""The numbers of image tokens that SparseVLM keeps and merges, and their slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from tokenprune.core.apportion import apportion
from tokenprune.core.decisions import MergeGroup
from tokenprune.core.stage import Positions, Stage
from tokenprune.core.tokens import ImageTokens
from tokenprune_strategies.ops.density_peaks import averages, density_peaks


class Cut(NamedTuple):
    """The numbers of one stage: tokens kept, dropped ones that are merged, and the clusters that these become."""

    kept: int
    recycled: int = 0
    clusters: int = 0

    @property
    def rows(self) -> int:
        """Image tokens that stay."""
        return self.kept + self.clusters


@dataclass(frozen=True)
class Pruning(Stage):
    """A stage with its numbers."""

    cut: Cut = field(kw_only=True)


def cuts(counts: Sequence[int], total: int, *, recycles: bool, always: bool) -> list[Cut]:
    """The numbers of every stage.

    Args:
        counts: tokens to keep, if there are as many.
        total: image tokens of the row.
        recycles: whether dropped tokens are merged: of p dropped ones int(0.3 · p) + 1 =: r, into int(r / 10) + 1.
        always: whether every stage drops at least one token.
    """
    found, present = [], total
    for count in counts:
        kept = min(count, max(0, present - always))
        recycled = int(0.3 * (present - kept)) + 1 if recycles and present > kept else 0
        found.append(Cut(kept, recycled, recycled // 10 + 1 if recycled else 0))
        present = found[-1].rows
    return found


def recycle(
    images: Sequence[ImageTokens], hidden: Tensor, scores: Tensor, cut: Cut, positions: Positions, noise: Tensor | None
) -> list[MergeGroup]:
    """The tokens of a row that stay.

    Of each image the kept tokens in their order, then the clusters' averages, best centre first, on the image's first
    slots; under "keep" all at their own slots, clusters at their centres'. A cluster's origin is its centre.

    Args:
        images: of the row.
        hidden: [N, width], states that are clustered.
        scores: float [N].
        cut: numbers of the row; images share them.
        positions: the policy.
        noise: float [N] for `density_peaks`, or None.
    """
    kept = apportion(cut.kept, [len(image) for image in images])
    recycled = apportion(cut.recycled, [len(image) - keep for image, keep in zip(images, kept, strict=True)])
    clusters = apportion(cut.clusters, recycled)
    groups = []
    for image, keep, some, count in zip(images, kept, recycled, clusters, strict=True):
        order = image.index[scores[image.index].argsort(descending=True, stable=True)]
        places, again = order[:keep].sort().values, order[keep : keep + some]
        members = torch.cat((places, again))
        weights = torch.zeros(keep + count, keep + some, dtype=torch.float32, device=scores.device)
        weights[:keep, :keep].fill_diagonal_(1)  # kept tokens are themselves
        if count:
            # section 3.3: clusters of what was dropped at high scores; each is its members' plain average
            peaks = density_peaks(hidden[again], count, None if noise is None else noise[again])
            weights[keep:, keep:] = averages(peaks.cluster, count)
            places = torch.cat((places, again[peaks.centres]))
        slots = image.index[: len(places)] if positions == "renumber" else places
        groups.append(MergeGroup(image.row, slots, members, weights, places))
    return groups
