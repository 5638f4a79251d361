"""Refusing what an author's code cannot do: images, if it is written for one image of a certain grid, and budgets."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tokenprune.core.tokens import ImageTokens, Tokens
from tokenprune.errors import BudgetError, OptionError


def check_no_budget(who: str, faithful: bool, budget: float | None) -> None:
    """Raise BudgetError for a budget of strategy `who`, whose number of tokens depends on the image if `faithful`."""
    if faithful and budget is not None:
        raise BudgetError(
            f"strategy {who!r}: with faithful=True the number of tokens depends on the image, so that no budget can be "
            "met; leave budget= out, or use faithful=False"
        )


def check_authors_grid(
    who: str, tokens: Tokens, rows: Sequence[Sequence[ImageTokens]], fits: Callable[[int, int], bool], expected: str
) -> None:
    """Raise OptionError for a batch row whose image tokens are not those of one image, of a complete grid that fits.

    Args:
        who: name of the strategy, whose option `faithful` is set.
        tokens: the tokens.
        rows: the images (crops) of every batch row.
        fits: whether a grid of that many rows and columns is possible.
        expected: in words.
    """
    for row, images in enumerate(rows):
        for image in images:
            cells = tokens.on_host("grid")[image.row, image.index_on_host]
            lines, columns = (cells.amax(0) + 1).tolist()
            raster = torch.cartesian_prod(torch.arange(lines), torch.arange(columns)).reshape(-1, 2)
            if len(images) > 1 or not torch.equal(cells, raster) or not fits(lines, columns):
                grid = f"{len(image)} tokens" if int(cells.min()) < 0 else f"a grid of {lines} x {columns}"
                found = f"{len(images)} images or crops" if len(images) > 1 else grid
                raise OptionError(
                    f"strategy {who!r}: option 'faithful': the authors' code processes {expected}, and batch row {row} "
                    f"has {found}; use faithful=False"
                )
