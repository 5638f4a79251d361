"""SparseVLM's numbers of kept and merged image tokens, and their slots."""

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
    """The numbers of one stage: kept tokens, dropped tokens that are merged, and the clusters that they form."""

    kept: int
    recycled: int = 0
    clusters: int = 0

    @property
    def rows(self) -> int:
        """Image tokens after the stage."""
        return self.kept + self.clusters


@dataclass(frozen=True)
class Pruning(Stage):
    """A stage with its numbers."""

    cut: Cut = field(kw_only=True)


def cuts(counts: Sequence[int], total: int, *, recycles: bool, always: bool) -> list[Cut]:
    """The numbers of each stage.

    Args:
        counts: tokens to keep at each stage, if there are as many.
        total: image tokens of the row.
        recycles: whether dropped tokens are merged: of p dropped ones int(0.3 · p) + 1 =: r, into int(r / 10) + 1.
        always: whether each stage drops at least one token.
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
    """The new tokens of a row.

    For each image, the kept tokens in their order, then the averages of clusters, best centre first, at the image's
    first slots; with "keep" at their original slots, clusters at those of their centres. A cluster's origin is its
    centre.

    Args:
        images: images of the row.
        hidden: [N, width], states that are clustered.
        scores: float [N].
        cut: numbers of the row, divided over its images.
        positions: the position policy.
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
        weights[:keep, :keep].fill_diagonal_(1)  # kept tokens are unchanged
        if count:
            # section 3.3: clusters of the dropped tokens with the highest scores; unweighted averages
            peaks = density_peaks(hidden[again], count, None if noise is None else noise[again])
            weights[keep:, keep:] = averages(peaks.cluster, count)
            places = torch.cat((places, again[peaks.centres]))
        slots = image.index[: len(places)] if positions == "renumber" else places
        groups.append(MergeGroup(image.row, slots, members, weights, places))
    return groups
