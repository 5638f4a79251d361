"""The state of a running comparison: accuracy on every scene, then the strategies' own FLOPs, then prefill times."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch

from tokenprune.core.stage import Shape
from tokenprune.core.strategy import Strategy
from tokenprune.cost import DecoderSpec
from tokenprune.datasets.base import Scene
from tokenprune.engine.calls.turns import model_turn
from tokenprune.errors import InputError, TokenPruneError
from tokenprune.evaluation import metrics
from tokenprune.evaluation.accounting import choice_flops, head_flops, query_cost, row_ledger
from tokenprune.evaluation.accumulator import Accumulator, Untouched
from tokenprune.evaluation.contenders import Contender
from tokenprune.evaluation.coverage import Box, target_coverage
from tokenprune.evaluation.measured import Measured, measure
from tokenprune.evaluation.protocol import SegmentationModel, SegmentationResult
from tokenprune.evaluation.samples import Outcome, SampleRecord
from tokenprune.evaluation.timing import interleaved_medians
from tokenprune.plugins.attribution import brief
from tokenprune.plugins.entries import Entry

T = TypeVar("T")


@dataclass
class ComparisonRun:
    """The state of one comparison."""

    model: SegmentationModel
    contenders: list[Contender]
    timing_samples: int
    keep_records: int
    added: list[Entry]
    tallies: list[Accumulator] = field(init=False)
    untouched: Untouched = field(default_factory=Untouched)
    scenes: int = 0
    kinds: list[str] = field(default_factory=list)
    sizes: list[str | None] = field(default_factory=list)
    records: list[SampleRecord] = field(default_factory=list)
    timed: list[tuple[Any, str, bool]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tallies = [Accumulator(contender) for contender in self.contenders]
        self.spec = DecoderSpec.from_config(self.model.decoder.config)
        self.element_bytes = next(self.model.decoder.parameters()).element_size()

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
            if not self.running():
                raise
            return None

    def evaluate(self, scene: Scene) -> None:
        """Run every contender on the queries of one scene."""
        image = self.model.encode_image(scene.image)
        box = self.model.grid_box(*scene.image.shape[:2])
        reference: SegmentationResult | None = None
        results: list[tuple[Accumulator, SegmentationResult]] = []
        for tally in self.running():
            strategy = tally.contender.strategy.reseeded(self.scenes)
            result = self.attempt(tally, partial(self._segment, image, scene, strategy))
            if result is None:
                continue
            results.append((tally, result))
            if reference is None and result.trace is not None and not result.trace.stages:
                reference = result  # without a decision the model is untouched
        if reference is None:
            reference = self._segment(image, scene, None)
        wanted = [query.mask for query in scene.queries]
        full = _masks(reference)
        for tally, result in results:
            trace = result.trace
            assert trace is not None
            tally.policies = dict(trace.policies)
            tally.is_untouched &= not trace.stages
            rows = batch_rows(result)
            for number, (mask, row) in enumerate(zip(_masks(result), rows, strict=True)):
                tally.overlaps.append(metrics.overlap(mask, wanted[number]))
                tally.agreements.append(metrics.overlap(mask, full[number]))
                tally.coverages.append(target_coverage(wanted[number], trace, row, box))
                for metric in self.added:
                    query, label = scene.queries[number], tally.contender.label
                    given = Measured(mask, wanted[number], full[number], query, trace, row, label)
                    tally.measured.setdefault(metric.name, []).append(measure(metric, given))
                ledger, sharing = row_ledger(trace.ledger, row), rows.count(row)
                tally.costs.append(query_cost(ledger, self.spec, self.element_bytes, sharing))
                if tally is results[0][0]:
                    self.untouched.costs.append(query_cost(ledger.unpruned(), self.spec, self.element_bytes, sharing))
        self._remember(scene, image, box, results)
        self.scenes += 1
        self.kinds.extend(query.kind for query in scene.queries)
        self.sizes.extend(metrics.size_of(mask) for mask in wanted)

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
            _, trace = self.model.run_decoder(inputs, strategy)
            assert trace is not None
            shape = Shape(self.spec.layers, trace.ledger.image_tokens[0], trace.ledger.other_tokens[0])
            bound = strategy.bind(shape)
            tally.options = bound.options.model_dump(mode="json", fallback=repr)
            own = choice_flops(self.model, inputs, bound, shape) if trace.stages else 0
            tally.choice_flops.append(own)

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

    def _segment(self, image: Any, scene: Scene, strategy: Strategy | None) -> SegmentationResult:
        queries = [query.text for query in scene.queries]
        sentences = [query.is_sentence for query in scene.queries]
        return self.model.segment(image, queries, strategy=strategy, is_sentence=sentences)

    def _remember(
        self, scene: Scene, image: Any, box: Box, results: list[tuple[Accumulator, SegmentationResult]]
    ) -> None:
        number = len(self.timed) % len(scene.queries)  # a different kind of query each time
        if len(self.timed) < max(self.timing_samples, 1):
            query = scene.queries[number]
            self.timed.append((image, query.text, query.is_sentence))
        if len(self.records) < self.keep_records:
            number = len(self.records) % len(scene.queries)
            query = scene.queries[number]
            record = SampleRecord(scene.id, scene.image, query.text, query.mask, box)
            for tally, result in results:
                contender = tally.contender
                mask, row = _masks(result)[number], batch_rows(result)[number]
                iou = metrics.expression_iou(*metrics.overlap(mask, query.mask))
                outcome = Outcome(contender.label, mask, result.trace, row, iou, contender.budget)
                record.outcomes.append(outcome)
            self.records.append(record)


def batch_rows(result: SegmentationResult) -> list[int]:
    """The batch row of the trace for each mask of a forced answer: `row_index`, or by default the mask's own number."""
    return list(getattr(result, "row_index", ())) or list(range(len(result.masks)))


def _masks(result: SegmentationResult) -> list[Any]:
    return list(result.masks.detach().cpu().numpy())
