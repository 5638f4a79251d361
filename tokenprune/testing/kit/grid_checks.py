"""Checks that the image numbers and grid cells of a prompt, as an adapter gives them, form complete images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

MANY = 12


def check_cells(
    prompt: str,
    numbers: Sequence[int],
    cells: Sequence[Sequence[int]],
    sizes: Sequence[tuple[int, int]] | None = None,
    in_reading_order: bool = True,
) -> None:
    """Raise if they do not.

    Args:
        prompt: its name, for messages.
        numbers: image number of each image token, in the order of the prompt.
        cells: row and column of each.
        sizes: rows and columns of cells of each image; None = not compared.
        in_reading_order: whether an image's tokens are in the prompt row by row, from left to right.

    Raises:
        AssertionError: says what was found, what was expected, and what to look at.
    """
    assert (numbers[0], min(numbers)) == (0, 0), (
        f"{prompt}: images must be numbered from 0; found {_short(numbers)} (−1 is for other tokens)"
    )
    assert all(b - a in (0, 1) for a, b in pairwise(numbers)), f"{prompt}: images not in order; found {_short(numbers)}"
    assert min(map(min, cells)) >= 0, (
        f"{prompt}: an image token without a cell; found {_short(cells)}; only unbroken runs of a square number of "
        "tokens get cells by themselves: give grid and image_number to PromptMasks, and see that no separator is marked"
    )
    for number in range(numbers[-1] + 1):
        image = [tuple(cell) for cell, of in zip(cells, numbers, strict=True) if of == number]
        name = f"{prompt}, image {number}"
        twice = len(image) - len({*image})
        assert not twice, f"{name}: {twice} image tokens in a cell that another one of the image has; {_short(image)}"
        assert not in_reading_order or image == sorted(image), (
            f"{name}: cells do not run row by row in the order of the prompt; found {_short(image)}; cells are (row, "
            "column), or set in_reading_order = False"
        )
        if sizes is not None and number < len(sizes):
            found = tuple(1 + max(cell[axis] for cell in image) for axis in (0, 1))
            assert found == tuple(sizes[number]), f"{name}: cells of {found} rows and columns, expected {sizes[number]}"
    if sizes is not None:
        assert len(sizes) == numbers[-1] + 1, f"{prompt}: {numbers[-1] + 1} images found, expected {len(sizes)}"


def _short(values: Sequence[object]) -> str:
    shown = ", ".join(str(value) for value in values[:MANY])
    return f"[{shown}, … {len(values) - MANY} more]" if len(values) > MANY else f"[{shown}]"
