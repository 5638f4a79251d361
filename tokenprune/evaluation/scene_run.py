"""All contenders on the queries of one scene: the step that comparisons and sweeps repeat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tokenprune.core.strategy import Strategy
from tokenprune.core.trace import Trace
from tokenprune.cost import DecoderSpec
from tokenprune.datasets.base import Query, Scene
from tokenprune.evaluation import metrics
from tokenprune.evaluation.accounting import QueryCost, query_cost, row_ledger
from tokenprune.evaluation.contenders import Contender
from tokenprune.evaluation.coverage import Box, target_coverage
from tokenprune.evaluation.measured import Measured, measure
from tokenprune.evaluation.protocol import SegmentationResult, TurnTaking
from tokenprune.evaluation.protocols import protocol_of
from tokenprune.evaluation.records import Record, stages_of
from tokenprune.plugins.entries import Entry
from tokenprune.utils.stopwatch import TOTAL, recorded

T = TypeVar("T")
Attempt = Callable[[int, Callable[[], T]], T | None]


@dataclass(frozen=True, eq=False)
class SceneResult:
    """What the contenders gave on one scene.

    Attributes:
        box: the part of the image that the image tokens divide.
        encoded: what `encode_image` returned.
        results: by contender, those that could run.
        records: by contender, one for each query.
        untouched: the cost of each query without pruning.
    """

    box: Box
    encoded: Any
    results: dict[int, SegmentationResult]
    records: dict[int, list[Record]]
    untouched: list[QueryCost]


@dataclass
class SceneRun:
    """Runs contenders on scenes of one model.

    Attributes:
        model: the model.
        protocol: how queries are asked, see `evaluation.protocols`.
        added: metrics that plugins add.
        keep_masks: whether records hold masks and stages.
        seed: added to the seeds of strategies that draw random numbers, beside the scene's number.
    """

    model: TurnTaking
    protocol: str = "forced"
    added: Sequence[Entry] = ()
    keep_masks: bool = False
    seed: int = 0
    spec: DecoderSpec = field(init=False)
    element_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.spec = DecoderSpec.from_config(self.model.decoder.config)
        self.element_bytes = next(self.model.decoder.parameters()).element_size()

    def run(self, scene: Scene, number: int, contenders: dict[int, Contender], attempt: Attempt[Any]) -> SceneResult:
        """Run contenders on the queries of one scene; the image is encoded once.

        Args:
            scene: with its queries.
            number: of the scene in its split; random choices differ between scenes.
            contenders: by their numbers.
            attempt: called with a contender's number and its run; returns None where the contender cannot run.
        """
        with recorded() as encoding:
            encoded = self.model.encode_image(scene.image)
        reference: SegmentationResult | None = None
        results: dict[int, SegmentationResult] = {}
        times: dict[int, dict[str, float]] = {}
        for key, contender in contenders.items():
            strategy = contender.strategy.reseeded(number + self.seed)
            with recorded() as taken:
                result = attempt(key, partial(self.segment, encoded, scene, strategy))
            if result is None:
                continue
            results[key] = result
            times[key] = {**encoding, **taken, TOTAL: encoding[TOTAL] + taken[TOTAL]}
            if reference is None and result.trace is not None and not result.trace.stages:
                reference = result  # without a decision the model is untouched
        box = self.model.grid_box(*scene.image.shape[:2])
        if not results:
            return SceneResult(box, encoded, {}, {}, [])
        full = masks_of(reference or self.segment(encoded, scene, None))
        names = sample_names(scene)
        records: dict[int, list[Record]] = {}
        for key, result in results.items():
            trace, rows = result.trace, batch_rows(result)
            assert trace is not None
            records[key] = [
                self._record(number, names, query, mask, full, trace, rows, times[key], box, scene, contenders[key])
                for query, mask in enumerate(masks_of(result))
            ]
        first = next(iter(results.values()))
        assert first.trace is not None
        rows = batch_rows(first)
        untouched = [self._cost(first.trace, row, rows.count(row), unpruned=True) for row in rows]
        return SceneResult(box, encoded, results, records, untouched)

    def segment(self, encoded: Any, scene: Scene, strategy: Strategy | None) -> SegmentationResult:
        """The masks of all queries of a scene."""
        return protocol_of(self.protocol)(self.model, encoded, scene, strategy)

    def _record(
        self,
        number: int,
        names: list[str],
        query: int,
        mask: NDArray[np.bool_],
        full: list[NDArray[np.bool_]],
        trace: Trace,
        rows: list[int],
        times: dict[str, float],
        box: Box,
        scene: Scene,
        contender: Contender,
    ) -> Record:
        asked: Query = scene.queries[query]
        wanted, row = np.asarray(asked.mask), rows[query]
        given = Measured(mask, wanted, full[query], asked, trace, row, contender.label) if self.added else None
        return Record(
            scene=number,
            query=query,
            sample=names[query],
            kind=asked.kind,
            size=metrics.size_of(wanted),
            overlap=metrics.overlap(mask, wanted),
            agreement=metrics.overlap(mask, full[query]),
            coverage=target_coverage(wanted, trace, row, box),
            cost=self._cost(trace, row, rows.count(row)),
            layers=tuple(entry.image[row] for entry in trace.ledger.entries),
            milliseconds={step: value / len(scene.queries) for step, value in times.items()},
            metrics={metric.name: measure(metric, given) for metric in self.added} if given else {},
            mask=mask if self.keep_masks else None,
            stages=stages_of(trace, row, box) if self.keep_masks else (),
        )

    def _cost(self, trace: Trace, row: int, sharing: int, unpruned: bool = False) -> QueryCost:
        ledger = row_ledger(trace.ledger, row)
        return query_cost(ledger.unpruned() if unpruned else ledger, self.spec, self.element_bytes, sharing)


def sample_names(scene: Scene) -> list[str]:
    """A name for each query of a scene: its own, or "scene#number"."""
    return [query.id or f"{scene.id}#{number}" for number, query in enumerate(scene.queries)]


def batch_rows(result: SegmentationResult) -> list[int]:
    """The batch row of the trace for each mask of a forced answer: `row_index`, or by default the mask's own number."""
    return list(getattr(result, "row_index", ())) or list(range(len(result.masks)))


def masks_of(result: SegmentationResult) -> list[NDArray[np.bool_]]:
    """The masks as arrays, bool [H, W] each."""
    return list(result.masks.detach().cpu().numpy())
