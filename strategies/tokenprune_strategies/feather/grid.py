"""FEATHER's grid of tokens that stay whatever their attention."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt

import torch
from torch import Tensor

from tokenprune.core.tokens import ImageTokens, Tokens
from tokenprune.errors import OptionError


def stride_grid(tokens: Tokens, images: Sequence[ImageTokens], stride: int, *, square: bool) -> Tensor:
    """bool [batch, N]: the tokens whose row and column in the image are multiples of the stride; none if it is 0.

    In an image whose tokens have no cells it is every stride²-th token; tokens without a cell beside others that have
    one (ends of lines) are not in the grid (ours).

    Args:
        tokens: the tokens.
        images: their images.
        stride: distance of rows and columns.
        square: whether images are taken as squares, row by row, as in the authors' code.

    Raises:
        OptionError: an image has no square number of tokens, and `square`.
    """
    mask = torch.zeros(tokens.exists.shape, dtype=torch.bool)  # on the host, which knows the cells
    for image in images if stride else ():
        index = image.index_on_host
        places = torch.arange(len(index))
        cells = tokens.on_host("grid")[image.row, index]
        known = (cells >= 0).all(1)
        if square:
            side = isqrt(len(index))
            if side * side != len(index):
                raise OptionError(
                    f"strategy 'feather': option 'faithful': found an image of {len(index)} tokens, and the authors' "
                    "code takes square images only; use faithful=False, or stride=0"
                )
            cells, known = torch.stack((places // side, places % side), 1), places >= 0
        on_grid = known & (cells % stride == 0).all(1) if bool(known.any()) else places % stride**2 == 0
        mask[image.row, index[on_grid]] = True
    return mask.to(tokens.device, non_blocking=True)
