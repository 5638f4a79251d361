"""Words that tell an instance from the others of its class in a picture: by being the only one, by side, by size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

KINDS = ("class", "side", "size")
LEAST = 0.015  # of the picture's area: smaller instances are not asked for
APART = 0.06  # of the root of the picture's area: instances less far from each other have no sides
BIGGER = 1.5  # times the area of the next


def place_queries(name: str, masks: Sequence[NDArray[np.bool_]]) -> list[tuple[str, int, str]]:
    """What can be asked about the instances of a class: (query, number of the instance, one of KINDS).

    Args:
        name: of the class.
        masks: all its instances in a picture, bool [H, W] each with at least one pixel.

    Examples:
        >>> import numpy as np
        >>> masks = np.zeros((2, 20, 40), dtype=bool)
        >>> masks[0, :10, :10] = masks[1, 5:10, 30:] = True
        >>> place_queries("dog", masks)
        [('the dog on the left', 0, 'side'), ('the dog on the right', 1, 'side'), ('the biggest dog', 0, 'size')]
    """
    sizes = [int(mask.sum()) for mask in masks]
    area = masks[0].size if len(masks) else 0
    large = [number for number, size in enumerate(sizes) if size >= LEAST * area]
    found = [(f"the {name}", 0, "class")] if len(masks) == 1 and large else []
    if len(large) < 2:
        return found
    middles = [float(np.nonzero(masks[number].any(0))[0].mean()) for number in large]
    order = np.argsort(middles)
    for word, end, near in (("left", 0, 1), ("right", -1, -2)):
        if abs(middles[order[end]] - middles[order[near]]) > APART * area**0.5:
            found.append((f"the {name} on the {word}", large[order[end]], "side"))
    first, second = sorted(large, key=lambda number: -sizes[number])[:2]
    if sizes[first] > BIGGER * sizes[second]:
        found.append((f"the biggest {name}", first, "size"))
    return found
