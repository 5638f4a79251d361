"""Writes tiny GLaMM checkpoints with random weights in the authors' format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lisa_checkpoints import CONFIG, WIDTH, State, write_lisa

ADDED = {
    "<im_start>": 640,
    "<im_end>": 641,
    "<bbox>": 642,
    "<point>": 643,
    "[SEG]": 644,
    "<p>": 645,
    "</p>": 646,
}
ROWS, HIDDEN = 647, 40
GLAMM: dict[str, Any] = {**CONFIG, "architectures": ["GLaMMForCausalLM"], "vocab_size": ROWS, "with_region": True}


def to_glamm(state: State) -> None:
    """Turn a LISA's tensors into a GLaMM's: other names, a projector of two layers, more rows, a region encoder."""
    drawn = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=drawn) * 0.2

    for name in list(state):
        if name.startswith("model.visual_model."):
            state[name.replace("visual_model", "grounding_encoder")] = state.pop(name)
    for name in ("model.mm_projector.weight", "model.mm_projector.bias"):
        del state[name]
    state["model.mm_projector.0.weight"], state["model.mm_projector.0.bias"] = draw(HIDDEN, 16), draw(HIDDEN)
    state["model.mm_projector.2.weight"], state["model.mm_projector.2.bias"] = draw(WIDTH, HIDDEN), draw(WIDTH)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = draw(ROWS, WIDTH)
    state["model.region_encoder.mlvl_fuse.input_conv.0.weight"] = draw(4, 6, 1, 1)


def write_glamm(
    folder: Path,
    *,
    config: dict[str, Any] | None = None,
    added: dict[str, int] | None = None,
    edit: Callable[[State], None] | None = None,
    **options: Any,
) -> Path:
    """Write a checkpoint folder; arguments as in `write_lisa`."""

    def edited(state: State) -> None:
        to_glamm(state)
        if edit is not None:
            edit(state)

    added = ADDED if added is None else added
    return write_lisa(folder, config={**GLAMM, **(config or {})}, added=added, edit=edited, **options)
