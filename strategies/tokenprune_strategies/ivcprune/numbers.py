"""How many tokens IVC-Prune keeps, for which reason, and from which layer on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tokenprune.core.budget import Ladder
from tokenprune.core.options import layer_of, tokens_of
from tokenprune.core.stage import Shape

COORDINATES = {"qwen": 0.1, "llava": 0.05}
FOREGROUND = 0.2  # of LLaVA's image tokens, by score


def seeds_of(size: int) -> int:
    """Number of seeds among an image's tokens; with Python's rounding, half to even, as in the authors' code."""
    return max(1, round(0.01 * size))


def coordinates_of(options: Any, size: int) -> int:
    """Tokens of an image chosen by cos, and as many by sin."""
    share = COORDINATES[options.variant] if options.coordinates is None else options.coordinates
    return round(share * size)


def authors_target(options: Any, size: int) -> int:
    """The least number of an image's tokens that the authors' code for Qwen2.5-VL keeps."""
    keep = options.keep
    return min(keep, size) if isinstance(keep, int) else round(keep * size)


def layers_and_counts(options: Any, shape: Shape) -> Iterator[Ladder]:
    """For each layer, numbers of tokens from all to as many as seeds and coordinates are; in the lowest, to one."""
    total, given = shape.image_tokens, options.model_fields_set
    first = layer_of(options.layer, shape.layers, "ivcprune", least=1)
    layers = [first] if "layer" in given else range(first, 0, -1)
    counts = [tokens_of(options.keep, total)] if "keep" in given else range(total, 0, -1)
    most = min(total, seeds_of(total) + 2 * coordinates_of(options, total))
    for layer in layers:
        least = 0 if layer == layers[-1] or "keep" in given else most
        yield [{"layer": layer, "keep": count} for count in counts if count >= least]
