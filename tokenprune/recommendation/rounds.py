"""Times of many small runs in turn, within a given time.

A round runs everything once: all cells, and in a cell the untouched model and every contender. Each round starts with
another of them, so that a drift of the machine affects all equally, and a ratio is of two runs of one round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch

from tokenprune.errors import TokenPruneError
from tokenprune.plugins.attribution import brief
from tokenprune.recommendation.intervals import least_values

Run = Callable[[], object]
Progress = Callable[[str, int, int], None]
LEAST = least_values()  # rounds: fewer show nothing
MOST = 40
CLEARLY = 2.0  # how far an estimate must exceed the time that is left: fixed costs make it too high
OVERRUN = 1.5  # of the given time, until LEAST rounds are done: without them the measurement would be for nothing


@dataclass(eq=False)
class Cell:
    """A number of image tokens and a batch size.

    Attributes:
        image_tokens, batch: its sizes.
        untouched: a prefill without pruning.
        contenders: prefills by the contender's number; those that cannot run are taken out.
        reasons: why they cannot.
        seconds: of each round, by contender; those of the untouched model under None.
        needs: 0, or the seconds that the cell would take, if it was left out for lack of time.
        round_seconds: of one round, from the warm-up.
    """

    image_tokens: int
    batch: int
    untouched: Run
    contenders: dict[int, Run]
    reasons: dict[int, str] = field(default_factory=dict)
    seconds: dict[int | None, list[float]] = field(default_factory=dict)
    needs: float = 0.0
    round_seconds: float = 0.0


@dataclass
class Rounds:
    """Times cells.

    Attributes:
        cells: what is timed.
        limit: seconds for all of it.
        most: rounds at most.
        clock: seconds; replaced in tests.
        alone: a context for every run; the time to enter it is not measured.
        progress: called with (name of the phase, steps done, steps in all).
        first: image tokens of the cells that get their time before the others; the others follow by their size.
    """

    cells: Sequence[Cell]
    limit: float
    most: int = MOST
    clock: Callable[[], float] = time.perf_counter
    alone: Callable[[], AbstractContextManager[object]] = nullcontext
    progress: Progress = lambda what, done, total: None
    first: int | None = None

    def run(self) -> int:
        """Fill the cells' `seconds`; returns the number of rounds."""
        self._start = self.clock()
        self._warm_up()
        measured = [cell for cell in self.cells if not cell.needs]
        together = sum(cell.round_seconds for cell in measured)
        if not together:
            return 0
        planned = min(self.most, max(LEAST, int(self._left() / together)))
        done = 0
        while done < planned and self._left() >= (together if done >= LEAST else self.limit * (1 - OVERRUN)):
            for number, cell in enumerate(measured):
                self._round(cell, done)
                self.progress("rounds", done * len(measured) + number + 1, planned * len(measured))
            done += 1
        self.progress("rounds", done * len(measured), done * len(measured))
        return done

    def _left(self) -> float:
        return self._start + self.limit - self.clock()

    def _warm_up(self) -> None:
        """Run everything once; cells for which there is no time are left out."""
        promised = 0.0  # to the cells so far
        ordered = sorted(self.cells, key=lambda cell: cell.image_tokens * cell.batch)
        smallest = ordered[0]
        self._timed(smallest.untouched)  # threads are started, memory is touched
        least = self._timed(smallest.untouched)
        per_token = least / (smallest.image_tokens * smallest.batch)  # of the untouched model, in the cell before
        ordered.sort(key=lambda cell: cell.image_tokens != self.first)
        for number, cell in enumerate(ordered):
            self.progress("warm-up", number, len(ordered))
            tokens = cell.image_tokens * cell.batch
            # a contender takes about as long as the untouched model; its own time is known once it ran
            runs = (1 + len(cell.contenders)) * (LEAST + 1)
            cell.needs = per_token * tokens * runs
            if cell.needs > CLEARLY * (self._left() - promised):
                continue  # a single run would take time from the others
            base = least if cell is smallest else self._timed(cell.untouched)
            per_token, cell.needs = base / tokens, base * runs
            if cell.needs > self._left() - promised:
                continue
            cell.seconds = {None: []}
            taken = {key: self._attempted(cell, key) for key in list(cell.contenders)}
            cell.round_seconds = base + sum(seconds for seconds in taken.values() if seconds is not None)
            cell.needs = cell.round_seconds * LEAST
            if cell.needs > self._left() - promised:
                cell.seconds = {}
                continue
            promised, cell.needs = promised + cell.needs, 0.0
        self.progress("warm-up", len(ordered), len(ordered))

    def _round(self, cell: Cell, number: int) -> None:
        keys: list[int | None] = [None, *cell.contenders]
        first = number % len(keys)
        for key in [*keys[first:], *keys[:first]]:
            seconds = self._timed(cell.untouched) if key is None else self._attempted(cell, key)
            if seconds is not None:
                cell.seconds.setdefault(key, []).append(seconds)

    def _attempted(self, cell: Cell, key: int) -> float | None:
        """The seconds of a contender's run; None if it cannot run: it is then taken out of this cell."""
        try:
            return self._timed(cell.contenders[key])
        except (TokenPruneError, torch.OutOfMemoryError) as error:
            cell.reasons[key] = str(error) if isinstance(error, TokenPruneError) else brief(error)
            del cell.contenders[key]
            cell.seconds.pop(key, None)
            return None

    def _timed(self, run: Run) -> float:
        with self.alone():
            start = self.clock()
            run()
            return self.clock() - start
