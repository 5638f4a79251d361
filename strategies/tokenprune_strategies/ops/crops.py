"""Images that the vision tower saw in several crops."""

from __future__ import annotations

from torch import Tensor

from tokenprune.core.reads import Crops, Read
from tokenprune.core.stage import Shape, Stage
from tokenprune.core.tokens import Tokens
from tokenprune_strategies.ops.allocation import images_of


def crop_reads(shape: Shape) -> tuple[Read, ...]:
    """What `crops_of` reads: the crops, where the model tells them."""
    return (Crops(),) if shape.offers(Crops) else ()


def crops_of(stage: Stage, tokens: Tokens, row: int) -> list[list[Tensor]]:
    """Of each image of a batch row, its crops: numbers of the tokens that take part, int64 [n] each.

    An image is one crop where the stage does not read `Crops`.
    """
    images = [image[tokens.active[row, image]] for image in images_of(tokens, row)]
    if Crops() not in stage.reads:
        return [[image] for image in images]
    numbers = tokens.crops[row]
    return [[image[numbers[image] == crop] for crop in numbers[image].unique()] for image in images]


def every_crop(stage: Stage, tokens: Tokens, row: int) -> list[Tensor]:
    """`crops_of`, those of all images in one list."""
    return [crop for crops in crops_of(stage, tokens, row) for crop in crops]
