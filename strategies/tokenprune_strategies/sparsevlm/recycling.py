"""How many image tokens SparseVLM keeps and merges, and where they go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tokenprune.core.stage import Positions, Stage
from tokenprune.core.tokens import Tokens
from tokenprune_strategies.ops.allocation import apportion, present_images
from tokenprune_strategies.ops.density_peaks import averages, density_peaks


class Cut(NamedTuple):
    """The numbers of one stage: tokens kept, dropped ones that are merged, and the clusters that these become."""

    kept: int
    recycled: int = 0
    clusters: int = 0

    @property
    def rows(self) -> int:
        """Image tokens that run on."""
        return self.kept + self.clusters


@dataclass(frozen=True)
class Pruning(Stage):
    """A stage with its numbers."""

    cut: Cut | None = None


def cuts(counts: Sequence[int], total: int, *, recycles: bool, always: bool) -> list[Cut]:
    """The numbers of every stage.

    Args:
        counts: tokens to keep, where there are as many.
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
    tokens: Tokens, row: int, scores: Tensor, cut: Cut, positions: Positions, noise: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Slots int64 [m] ascending, origins int64 [m] and weights float32 [m, N] of the tokens of a row that run on.

    Of each image the kept tokens in their order, then the clusters' averages, best centre first, on the image's first
    slots; under "keep" all at their own slots, clusters at their centres'. A cluster's origin is its centre.

    Args:
        tokens: of the batch.
        row: its number.
        scores: float [N].
        cut: numbers of the row; images share them.
        positions: the policy.
        noise: float [N] for `density_peaks`, or None.
    """
    images = present_images(tokens, row)
    kept = apportion(cut.kept, [len(image) for image in images])
    recycled = apportion(cut.recycled, [len(image) - keep for image, keep in zip(images, kept, strict=True)])
    clusters = apportion(cut.clusters, recycled)
    empty = scores.new_zeros(0).long()
    parts = [(empty, empty, scores.new_zeros(0, len(scores), dtype=torch.float32))]
    for image, keep, some, count in zip(images, kept, recycled, clusters, strict=True):
        order = image[scores[image].argsort(descending=True, stable=True)]
        places, again = order[:keep].sort().values, order[keep : keep + some]
        weights = torch.zeros(keep + count, len(scores), dtype=torch.float32, device=scores.device)
        weights[torch.arange(keep, device=places.device), places] = 1
        if count:
            centres, cluster = density_peaks(tokens.hidden[row, again], count, None if noise is None else noise[again])
            weights[keep:, again] = averages(cluster, count)
            places = torch.cat((places, again[centres]))
        sort = torch.arange(len(places), device=places.device) if positions == "renumber" else places.argsort()
        parts.append((image[: len(places)] if positions == "renumber" else places[sort], places[sort], weights[sort]))
    slots, origins, merging = (torch.cat(part) for part in zip(*parts, strict=True))
    return slots, origins, merging
