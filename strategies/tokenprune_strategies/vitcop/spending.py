"""How a budget becomes ViTCoP's numbers of tokens and clusters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tokenprune.core.budget import Ladder
from tokenprune.core.stage import Shape
from tokenprune_strategies.ops.falling_stages import layers_of


def shallow_tokens(mean: float, kept: int, shallow: int, deep: int, layers: int) -> float:
    """Tokens from the shallow layer on, with a fifth of them from the deep layer on, for a mean over all layers.

    Args:
        mean: image tokens, mean over the layers.
        kept: image tokens that the tower leaves.
        shallow: layer of the merge.
        deep: layer of the last choice.
        layers: of the decoder (the authors: 32, whatever it has).
    """
    return (layers * mean - shallow * kept) / (deep - shallow + (layers - deep) / 5)


def spending(strategy: Any, shape: Shape) -> Iterator[Ladder]:
    """The settings that a budget may choose for the options `keep` and `clusters`.

    The published ones lie on two lines: for a mean share r the tower leaves 0.2 + 0.9 r, and clusters are 0.09 + 0.27 r
    of that. Between and beyond them the lines are continued (ours). If nothing would remain for the layers after the
    merge, the tower leaves less.
    """
    given, total = strategy.options.model_fields_set, shape.image_tokens
    if "keep" in given:
        yield [{}]
        return
    shallow, deep = layers_of(strategy.options.layers, shape.layers, strategy.name)

    def setting(mean: int, *counts: int) -> dict[str, Any]:
        share = {} if "clusters" in given else {"clusters": round(0.09 + 0.27 * mean / total, 4)}
        return {"keep": counts, **share}

    rungs = []
    for mean in range(total, 0, -1):
        first = min(total, max(1, (2 * total + 9 * mean) // 10))
        second = min(first, int(shallow_tokens(mean, first, shallow, deep, shape.layers) + 1e-6))
        if second < 1:
            break
        rungs.append(setting(mean, first, second, max(1, second // 5)))
    yield rungs
    yield [setting(0, first, 1, 1) for first in range(total, 0, -1)]
