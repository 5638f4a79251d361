"""Towers that run on a batch of crops: the number of crops, and the [CLS] state of each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.engine import shadowed


class CropStates:
    """Outputs of layers of a tower that runs on crops, and the number of crops.

    Args:
        layers: numbers of the layers whose states are recorded.
    """

    def __init__(self, layers: Collection[int]) -> None:
        self.states: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        self.shapes: list[torch.Size] = []
        self.device = torch.device("cpu")

    def attach(self, blocks: Sequence[nn.Module], undo: ExitStack) -> None:
        """Intercept the layers until `undo` is closed."""

        def count(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            self.shapes.append(_first(output).shape)
            self.device = _first(output).device
            return output

        def note(kept: list[Tensor], original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            kept.append(_first(output).detach())
            return output

        undo.enter_context(shadowed(blocks[0], "forward", count))
        for layer, kept in self.states.items():
            undo.enter_context(shadowed(blocks[layer], "forward", partial(note, kept)))

    def cls_features(self, cut: int) -> Tensor:
        """[crops, patches, C]: the [CLS] state of each crop, for each of its patches; several layers concatenated."""
        rows = torch.cat([torch.cat([state[:, :1] for state in states]) for states in self.states.values()], -1)
        return rows.expand(-1, self.shapes[0][1] - cut, -1)

    def numbers(self, cut: int) -> Tensor:
        """float32 [crops, patches, 1]: the number of the crop."""
        total = sum(shape[0] for shape in self.shapes)
        return torch.arange(float(total), device=self.device)[:, None, None].expand(-1, self.shapes[0][1] - cut, -1)


def _first(output: Any) -> Tensor:
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first
