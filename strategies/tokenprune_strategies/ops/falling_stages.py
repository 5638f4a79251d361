"""Stages that keep less and less: where they stand in decoders of other depths, how they spend a budget (ours)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tokenprune.core.stage import Shape
from tokenprune.errors import IncompatibleError, OptionError

Counts = tuple[int, ...]


def layers_of(depths: Sequence[int | float], layers: int, who: str) -> Counts:
    """The layers that `Depth`s mean, ascending: fractions go to the nearest layer that leaves one to every stage.

    Raises:
        IncompatibleError: fewer layers than the stages need.
        OptionError: explicit layers that are not ascending, or not in the model.
    """
    if layers <= len(depths):
        raise IncompatibleError(
            f"strategy {who!r} has {len(depths)} stages after the first layer, and the model has {layers} layers; "
            "give it fewer stages by its option 'layers', or take a deeper model"
        )
    found: list[int] = []
    for number, depth in enumerate(depths):
        nearest = int(depth * layers + 0.5) if isinstance(depth, float) else depth
        first, last = found[-1] + 1 if found else 1, layers - (len(depths) - number)
        found.append(min(max(nearest, first), last) if isinstance(depth, float) else nearest)
    if sorted(set(found)) != found or found[-1] >= layers:
        raise OptionError(
            f"strategy {who!r}: option 'layers': {list(depths)} gives layers {found}, expected ascending ones below "
            f"{layers}, the model's layers"
        )
    return tuple(found)


def windows(layers: Counts) -> list[Counts]:
    """These layers, and then all of them earlier by one factor, the first by a layer at a time, down to layer 1."""
    found = []
    for first in range(layers[0], 0, -1):
        moved: list[int] = []
        for layer in layers:
            moved.append(max(int(first * layer / layers[0] + 0.5), moved[-1] + 1 if moved else 1))
        found.append(tuple(moved))
    return found


def falling(who: str, counts: Sequence[int]) -> Counts:
    """The counts. Raises OptionError where a stage would keep more than the one before."""
    if list(counts) != sorted(counts, reverse=True):
        raise OptionError(
            f"strategy {who!r}: option 'keep': the stages would keep {list(counts)} image tokens, expected no more "
            "in a stage than in the one before"
        )
    return tuple(counts)


def fill(
    budget: float,
    shape: Shape,
    places: Sequence[Counts],
    candidates: Sequence[Counts],
    rows: Callable[[Counts], Counts] = lambda counts: counts,
    least: float = 0.0,
) -> tuple[Counts, Counts] | float:
    """The layers and counts that come closest to a budget without passing it, or the least share of N that is needed.

    At the first of `places` where the first stage keeps at least `least` · N (or else at the last), the first of
    `candidates` that fits; what is then left over goes to the last stage, then to the one before, ….

    Args:
        budget: equivalent tokens / N, at most.
        shape: of the run.
        places: layers that the stages may begin at, the preferred ones first.
        candidates: counts that the stages may keep, the most first; a single one is taken as it is.
        rows: from counts to the tokens that run on after each stage, merged ones included.
        least: a share of N.
    """
    total, room = shape.image_tokens, budget * shape.image_tokens * shape.layers + 1e-6

    def spent(layers: Counts, counts: Counts) -> int:
        ends = (*layers[1:], shape.layers)
        return layers[0] * total + sum(
            n * (end - start) for n, start, end in zip(rows(counts), layers, ends, strict=True)
        )

    for layers in places:
        found = next((counts for counts in candidates if spent(layers, counts) <= room), None)
        if found is None or (found[0] < least * total and layers != places[-1]):
            continue
        turns = [*reversed(range(len(found)))] * len(found) if len(candidates) > 1 else []
        for stage in turns:
            while found[stage] < (found[stage - 1] if stage else total):
                more = (*found[:stage], found[stage] + 1, *found[stage + 1 :])
                if spent(layers, more) > room:
                    break
                found = more
        return layers, found
    return spent(places[-1], candidates[-1]) / shape.layers
