"""Mean states of a tower's layers, added up while the tower runs, so that they need not be kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor, nn

from tokenprune.core.reads import TowerStates
from tokenprune.engine import shadowed


class MeanStates:
    """The values of `TowerStates` reads.

    Args:
        reads: the reads.
        layers: of the tower.

    Raises:
        InputError: the tower does not have the layers of a read.
    """

    def __init__(self, reads: Iterable[TowerStates], layers: int) -> None:
        self._numbers = {read: read.numbers(layers) for read in reads}
        self._sums: dict[TowerStates, list[Tensor]] = {read: [] for read in self._numbers}

    def attach(self, blocks: Sequence[nn.Module], undo: ExitStack) -> None:
        """Intercept the layers until `undo` is closed; each call of the tower begins new sums."""
        wanted = {number for numbers in self._numbers.values() for number in numbers}

        def add(number: int, state: Tensor) -> None:
            for read, numbers in self._numbers.items():
                if number == numbers[0]:
                    self._sums[read].append(state.detach().float())
                elif number in numbers:
                    self._sums[read][-1] = self._sums[read][-1] + state.detach().float()

        def note(number: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if number == 1 and 0 in wanted:
                add(0, args[0] if args else kwargs["hidden_states"])
            output = original(*args, **kwargs)
            if number in wanted:
                add(number, output[0] if isinstance(output, tuple) else output)
            return output

        for number, block in enumerate(blocks, 1):
            if number in wanted or (number == 1 and 0 in wanted):
                undo.enter_context(shadowed(block, "forward", partial(note, number)))

    def patches(self, read: TowerStates, cut: int) -> list[Tensor]:
        """For each call of the tower float32 [crops, patches, C], without the `cut` leading positions ([CLS])."""
        means = [total / len(self._numbers[read]) for total in self._sums[read]]
        # a tower of packed images has one sequence, without an axis of crops
        return [(mean if mean.dim() == 3 else mean[None])[:, cut:] for mean in means]
