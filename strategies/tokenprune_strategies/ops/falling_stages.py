"""Stages that keep fewer and fewer tokens: their layers in decoders of any depth, and their budgets (ours)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tokenprune.core.budget import Ladder
from tokenprune.core.stage import Shape
from tokenprune.errors import IncompatibleError, OptionError

Counts = tuple[int, ...]


def layers_of(depths: Sequence[int | float], layers: int, who: str) -> Counts:
    """The layers of `Depth`s, ascending: fractions are rounded to the nearest layer that leaves one for every stage.

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
    """The counts. Raises OptionError if a stage would keep more than the previous one."""
    if list(counts) != sorted(counts, reverse=True):
        raise OptionError(
            f"strategy {who!r}: option 'keep': the stages would keep {list(counts)} image tokens, expected no more "
            "in a stage than in the previous one"
        )
    return tuple(counts)


def falling_ladders(strategy: Any, shape: Shape, counts: Sequence[Counts], least: float) -> Iterator[Ladder]:
    """What a budget moves of a strategy with options `layers` and `keep`: first the counts, then the layers.

    Args:
        strategy: with `Depth`s as layers.
        shape: of the run.
        counts: that the stages may keep, the most first; a single one is used as it is.
        least: a share of N. If the first stage would keep less, all stages begin earlier instead, if possible.
    """
    layers = layers_of(strategy.options.layers, shape.layers, strategy.name)
    places = [layers] if "layers" in strategy.options.model_fields_set else windows(layers)
    for place in places:
        enough = 0 if place == places[-1] else least * shape.image_tokens
        yield [{"layers": place, "keep": numbers} for numbers in counts if numbers[0] >= enough]
