"""CSP's budget solver (ours)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tokenprune.core.stage import Shape

LEAST_SCALE = 0.25


class Filled(NamedTuple):
    """The options s, p, N_c and N_p."""

    scatter_at: int
    prune_at: int
    representatives: int
    keep: int


def fill(
    budget: float,
    shape: Shape,
    windows: Sequence[tuple[int, int]],
    fixed: tuple[int | None, int | None],
    shares: tuple[float, float],
) -> Filled | float:
    """The (s, p, N_c, N_p) that come closest to a budget without exceeding it, or the smallest possible share of N.

    N_c and N_p scale together, in the proportion of their defaults, up or down; the remainder goes to N_p. Before they
    fall below a quarter of the defaults, the window of layers that see every image token is shortened, down to a single
    layer.

    Args:
        budget: equivalent tokens / N, at most.
        shape: the shape.
        windows: (s, p) to try, the longest first.
        fixed: N_c and N_p if the user gave them.
        shares: of N, the defaults of N_c and N_p.
    """
    total, layers = shape.image_tokens, shape.layers
    room = budget * total * layers + 1e-6
    for start, end in windows:
        few = LEAST_SCALE * shares[0] * total if fixed[0] is None else fixed[0]
        kept = LEAST_SCALE * shares[1] * total if fixed[1] is None else fixed[1]
        wanted = start * few + (end - start) * total + (layers - end) * kept
        if wanted > room and (start, end) != windows[-1]:
            continue
        sizes = _sizes(room - (end - start) * total, start, layers - end, total, fixed, shares[1] / shares[0])
        if sizes is not None:
            return Filled(start, end, *sizes)
    start, end = windows[-1]
    least = start * (fixed[0] or 1) + (end - start) * total + (layers - end) * (fixed[1] or 1)
    return least / layers


def _sizes(
    room: float, before: int, after: int, total: int, fixed: tuple[int | None, int | None], proportion: float
) -> tuple[int, int] | None:
    """The largest N_c and N_p with before · N_c + after · N_p <= room; None if not even one token each fits."""
    candidates = range(total, 0, -1) if fixed[0] is None else [fixed[0]]
    for few in candidates:
        kept = max(1, int(few * proportion)) if fixed[1] is None else fixed[1]
        left = room - before * few
        if after * kept <= left:
            return few, kept if fixed[1] is not None else min(total, int(left // after))
    return None
