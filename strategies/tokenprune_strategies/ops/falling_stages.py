"""Stages with decreasing numbers of tokens: their layers in decoders of any depth, and their budgets (ours)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tokenprune.core.budget import Ladder
from tokenprune.core.stage import Shape
from tokenprune.errors import IncompatibleError, OptionError

Counts = tuple[int, ...]


def layers_of(depths: Sequence[int | float], layers: int, who: str) -> Counts:
    """The layers of `Depth`s, ascending: fractions are rounded to the nearest layer such that all stages differ.

    Raises:
        IncompatibleError: the model has too few layers for the stages.
        OptionError: explicit layers are not ascending, or do not exist.
    """
    if layers <= len(depths):
        raise IncompatibleError(
            f"strategy {who!r} has {len(depths)} stages after the first layer, and the model has {layers} layers; "
            "set fewer stages with the option 'layers', or use a deeper model"
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
    """These layers, then the layers scaled down by a common factor, the first by one at a time, down to layer 1."""
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
    """The settings that a budget may choose for the options `layers` and `keep`: it lowers counts first, then layers.

    Args:
        strategy: a strategy whose option `layers` has `Depth`s.
        shape: the shape.
        counts: the candidates for the stages' counts, the largest first.
        least: a share of N. If the first stage would keep less, all stages begin earlier instead, if possible.
    """
    layers = layers_of(strategy.options.layers, shape.layers, strategy.name)
    places = [layers] if "layers" in strategy.options.model_fields_set else windows(layers)
    for place in places:
        enough = 0 if place == places[-1] else least * shape.image_tokens
        yield [{"layers": place, "keep": numbers} for numbers in counts if numbers[0] >= enough]
