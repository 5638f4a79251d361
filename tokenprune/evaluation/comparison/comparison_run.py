"""The state of a running comparison: accuracy on every scene, then the strategies' own FLOPs, then prefill times."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch

from tokenprune.datasets.base import Scene
from tokenprune.engine.interface.turns import model_turn
from tokenprune.errors import (
    BudgetError,
    IncompatibleError,
    InputError,
    OptionError,
    TokenPruneError,
    UnsupportedError,
)
from tokenprune.evaluation.accounting import head_flops, own_work
from tokenprune.evaluation.comparison.accumulator import Accumulator, Untouched
from tokenprune.evaluation.comparison.timing import interleaved_medians
from tokenprune.evaluation.contenders import Contender
from tokenprune.evaluation.models import TurnTaking
from tokenprune.evaluation.samples import Outcome, SampleRecord
from tokenprune.evaluation.scene_run import SceneResult, SceneRun, masks_of
from tokenprune.plugins.attribution import brief
from tokenprune.plugins.entries import Entry

T = TypeVar("T")


@dataclass
class ComparisonRun:
    """The state of one comparison."""

    model: TurnTaking
    contenders: list[Contender]
    timing_samples: int
    keep_records: int
    added: list[Entry]
    protocol: str = "forced"
    tallies: list[Accumulator] = field(init=False)
    runner: SceneRun = field(init=False)
    untouched: Untouched = field(default_factory=Untouched)
    scenes: int = 0
    queries: int = 0
    records: list[SampleRecord] = field(default_factory=list)
    timed: list[tuple[Any, str, bool]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tallies = [Accumulator(contender) for contender in self.contenders]
        self.runner = SceneRun(self.model, self.protocol, added=self.added)

    def running(self) -> list[Accumulator]:
        """The contenders that could run so far."""
        return [tally for tally in self.tallies if tally.reason is None]

    def attempt(self, tally: Accumulator, run: Callable[[], T]) -> T | None:
        """The result of `run`; None if the contender cannot run: it is then left out.

        Raises:
            InputError: an image or a query that cannot be used.
            TokenPruneError: no contender is left.
        """
        try:
            return run()
        except InputError:
            raise
        except (TokenPruneError, torch.OutOfMemoryError) as error:
            tally.reason = str(error) if isinstance(error, TokenPruneError) else brief(error)
            tally.failed = not isinstance(error, (BudgetError, IncompatibleError, OptionError, UnsupportedError))
            if not self.running():
                raise
            return None

    def evaluate(self, scene: Scene) -> None:
        """Run every contender on the queries of one scene."""
        entered = {number: tally.contender for number, tally in enumerate(self.tallies) if tally.reason is None}
        found = self.runner.run(
            scene, self.scenes, entered, lambda number, run: self.attempt(self.tallies[number], run)
        )
        for _, results in found.calls:
            for number, result in results.items():
                assert result.trace is not None
                self.tallies[number].policies = dict(result.trace.policies)
                self.tallies[number].is_untouched &= not result.trace.stages
        for number, records in found.records.items():
            self.tallies[number].records.extend(records)
        self.untouched.costs.extend(found.untouched)
        self._remember(scene, found)
        self.scenes += 1
        self.queries += sum(len(batch.queries) for batch, _ in found.calls)

    def count_own_work(self) -> None:
        """Measure the FLOPs of the strategies themselves and of the mask head; record the options that were used."""
        image, query, sentence = self.timed[0]
        self.untouched.head_flops = head_flops(self.model, image, query, sentence)
        for tally in self.running():
            self.attempt(tally, partial(self._count_own_work, tally))

    def _count_own_work(self, tally: Accumulator) -> None:
        strategy = tally.contender.strategy
        for image, query, sentence in self.timed[: max(self.timing_samples, 1)]:
            inputs = self._inputs(image, query, sentence)
            tally.options, flops = own_work(self.model, inputs, strategy, self.runner.spec.layers)
            tally.choice_flops.append(flops)

    def time(self, rounds: int, on_sample: Callable[[int], None]) -> None:
        """Time one query's prefill for the untouched model and every contender that differs from it."""
        if not self.timing_samples:
            return
        moving = [tally for tally in self.running() if not tally.is_untouched]
        done = iter(range(1, len(self.timed) + 1))
        seconds = interleaved_medians(
            [list(self._prefills(*sample, [None, *moving])) for sample in self.timed],
            rounds=rounds,
            on_sample=lambda: on_sample(next(done)),
            alone=lambda: model_turn(self.model.decoder),
        )
        for tally in self.tallies:
            tally.prefill_seconds = seconds[0]
        self.untouched.prefill_seconds, *own = seconds
        for tally, value in zip(moving, own, strict=True):
            tally.prefill_seconds = value

    def _prefills(
        self, image: Any, query: str, sentence: bool, tallies: list[Accumulator | None]
    ) -> Iterator[Callable[[], object]]:
        inputs = self._inputs(image, query, sentence)
        device = next(self.model.decoder.parameters()).device

        def timed(tally: Accumulator | None) -> Callable[[], object]:
            def run() -> None:
                if tally is None:
                    self.model.run_decoder(inputs, None)
                elif tally.reason is None:
                    self.attempt(tally, lambda: self.model.run_decoder(inputs, tally.contender.strategy))
                if device.type == "cuda":
                    torch.cuda.synchronize(device)

            return run

        return (timed(tally) for tally in tallies)

    def _inputs(self, image: Any, query: str, sentence: bool) -> Any:
        return self.model.build_inputs(image, [query], is_sentence=[sentence])

    def _remember(self, scene: Scene, found: SceneResult) -> None:
        number = len(self.timed) % len(scene.queries)  # a different kind of query each time
        if len(self.timed) < max(self.timing_samples, 1):
            query = scene.queries[number]
            self.timed.append((found.encoded, query.text, query.is_sentence))
        if len(self.records) < self.keep_records and found.calls:
            batch, results = found.calls[len(self.records) % len(found.calls)]
            place = len(self.records) % len(batch.queries)
            query = batch.scene.queries[place]
            record = SampleRecord(scene.id, scene.image, query.text, query.mask, found.box)
            for key, result in results.items():
                contender = self.contenders[key]
                (own,) = (one for one in found.records[key] if one.query == batch.queries[place])
                mask, row = masks_of(result)[place], result.row_index[place]
                record.outcomes.append(Outcome(contender.label, mask, result.trace, row, own.iou, contender.budget))
            self.records.append(record)
