"""Image tokens of transformers' own processors: their cells are where the picture has what they show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vlm_processors_packed
from numpy.typing import NDArray
from PIL import Image
from vlm_checkpoints import LOADED, write_vlm
from vlm_families import CURRENT
from vlm_families import FAMILIES as TINY

import tokenprune as tp
from tokenprune_adapters.hf import FAMILIES
from tokenprune_adapters.hf.arrangements.unread import Unread

pytestmark = pytest.mark.skipif(not CURRENT, reason="the tiny processors are those of transformers 5.20 and later")
WHOLE = {"molmo2", *(name for name in vlm_processors_packed.ROWS if FAMILIES[name].images is not Unread)}
"""Families each of whose images, in the layout, is the whole picture."""
HEIGHT, WIDTH, BLOCK = 64, 96, 16


@pytest.mark.parametrize("name", [one for one in LOADED if one.values[0] in WHOLE])
def test_the_token_that_changes_most_is_where_the_picture_changes(tmp_path: Path, name: str) -> None:
    model = tp.load(write_vlm(tmp_path / name, name))
    gray = np.random.default_rng(0).integers(100, 156, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    before, layout = tokens_of(name, model, gray)
    for top, left in [(0, 0), (16, 80), (48, 32)]:
        spotted = gray.copy()
        spotted[top + 4 : top + 12, left + 4 : left + 12] = 255
        change = (tokens_of(name, model, spotted)[0] - before).norm(dim=-1)
        for image in layout["number"].unique():
            own = layout["number"] == image
            cell, sides = layout["grid"][own][change[own].argmax()], layout["grid"][own].max(0).values + 1
            side = torch.tensor([HEIGHT, WIDTH]) / sides  # of a cell, in pixels
            distance = ((cell + 0.5) * side - torch.tensor([top, left]) - BLOCK / 2).abs()
            assert bool((distance <= (BLOCK + side) / 2).all())


def tokens_of(name: str, model: Any, pixels: NDArray[np.uint8]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Image tokens as the decoder gets them [N, width], and their cells and image numbers."""
    seen: list[torch.Tensor] = []

    def look(_: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        seen.append(args[0] if args else options["hidden_states"])

    inputs = model.inputs(Image.fromarray(pixels), "What is it?")
    hook = TINY[name].decoder(model.model).layers[0].register_forward_pre_hook(look, with_kwargs=True)
    with torch.inference_mode(), tp.prune(model, tp.strategy("none")) as run:
        model.model(**inputs)
    hook.remove()
    layout = run.trace.layout
    mask = layout.image_tokens[0]
    return seen[0][0, mask], {"grid": layout.grid[0, mask], "number": layout.image_number[0, mask]}
