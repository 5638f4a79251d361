"""How many tokens FEATHER keeps at each stage."""

from __future__ import annotations

from math import isqrt
from typing import Any

from tokenprune.core.options import tokens_of
from tokenprune.errors import OptionError
from tokenprune_strategies.ops.authors_grid import check_no_budget
from tokenprune_strategies.ops.falling_stages import Counts, falling


def check_stages(options: Any, budget: float | None) -> None:
    """Check what options mean together.

    Raises:
        OptionError: another number of counts than layers, or stages that the authors' code does not have.
        BudgetError: a budget for numbers that depend on the image.
    """
    stages = len(options.layers)
    check_no_budget("feather", options.faithful, budget)
    if options.stride == 1:
        raise OptionError(
            "strategy 'feather': option 'stride': found 1, with which the grid has every token and the first stage "
            "drops none; use 2 or more, or 0 for no grid"
        )
    if options.keep is not None and len(options.keep) != stages:
        raise OptionError(
            f"strategy 'feather': options 'layers' and 'keep': found {stages} and {len(options.keep)} values, expected "
            "one of each per stage"
        )
    if options.faithful and options.stride and stages != 2:
        raise OptionError(
            f"strategy 'feather': option 'layers': found {stages} with faithful=True; the authors' method with a grid "
            "has 2 stages; give 2 layers, or use stride=0 or faithful=False"
        )


def grid_size(total: int, stride: int) -> int:
    """Tokens of the grid in a square image of at least `total` tokens; 0 without a grid.

    Stages are declared before the image's sides are known. In an image of other sides, attention makes up the
    difference.
    """
    if not stride or not total:
        return 0
    side = isqrt(total - 1) + 1
    return min(total, (-(-side // stride)) ** 2)


def counts(options: Any, total: int) -> Counts:
    """Tokens that each stage keeps of `total`, the grid included. Raises OptionError if a stage would grow."""
    if options.keep is not None:
        return falling("feather", [tokens_of(amount, total) for amount in options.keep])
    share = 1 - options.removed
    return _chain(options, total, tokens_of(share, total), share)


def candidates(options: Any, total: int) -> list[Counts]:
    """Numbers of tokens among which a budget chooses, from most to fewest.

    By the share 1 − R, from 1 to 1/N; below, the first stage keeps only tokens of the grid, and at last one.
    """
    chains = [_chain(options, total, top, top / total) for top in range(total, 0, -1)]
    rest = (1,) * (len(options.layers) - 1)
    return chains + [(few, *rest) for few in range(grid_size(total, options.stride), 0, -1)]


def _chain(options: Any, total: int, top: int, share: float) -> Counts:
    """`top` tokens outside the grid and the grid, then at each stage share² of them (without a grid: share)."""
    found = [min(total, top + grid_size(total, options.stride))]
    factor = share * share if options.stride else share
    for _ in options.layers[1:]:
        found.append(min(found[-1], max(1, round(found[-1] * factor))))
    return tuple(found)


def authors_count(options: Any, size: int, first: bool) -> int:
    """How many of an image's `size` tokens the authors' code keeps by attention, truncated; it may be none."""
    share = 1 - options.removed  # as a float: 1 − 0.7 is 0.30000000000000004
    return int(size * share) if first or not options.stride else int(size * (share * share))
