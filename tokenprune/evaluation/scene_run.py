"""All contenders on the queries of one scene: the step that comparisons and sweeps repeat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenprune.core.strategy import Strategy
from tokenprune.core.trace import Trace
from tokenprune.cost import DecoderSpec
from tokenprune.datasets.base import Query, Scene
from tokenprune.evaluation import metrics
from tokenprune.evaluation.accounting import QueryCost, query_cost, row_ledger
from tokenprune.evaluation.contenders import Contender
from tokenprune.evaluation.coverage import Box, target_coverage
from tokenprune.evaluation.measured import Measured, measure
from tokenprune.evaluation.models import TurnTaking
from tokenprune.evaluation.protocols import Answers, protocol_of
from tokenprune.evaluation.records import Record, stages_of
from tokenprune.plugins.entries import Entry
from tokenprune.utils.mask_matching import match_masks
from tokenprune.utils.masks import foreground, ignored
from tokenprune.utils.stopwatch import TOTAL, recorded

T = TypeVar("T")
Bits = NDArray[np.bool_]
Attempt = Callable[[int, Callable[[], T]], T | None]


@dataclass(frozen=True, eq=False)
class Batch:
    """Queries of a scene that are asked in one call of the model.

    Attributes:
        number: of the scene.
        queries: their numbers in it.
        names: of them as samples.
        scene: with these queries alone.
        encoding: milliseconds of encoding the image, by step.
    """

    number: int
    queries: list[int]
    names: list[str]
    scene: Scene
    encoding: dict[str, float]


@dataclass(eq=False)
class SceneResult:
    """What the contenders gave on one scene.

    Attributes:
        box: the part of the image that the image tokens divide.
        encoded: what `encode_image` returned.
        calls: the batches, each with the answers by contender, of those that could run.
        records: by contender, one for each query.
        untouched: the cost of each query without pruning.
    """

    box: Box
    encoded: Any
    calls: list[tuple[Batch, dict[int, Answers]]] = field(default_factory=list)
    records: dict[int, list[Record]] = field(default_factory=dict)
    untouched: list[QueryCost] = field(default_factory=list)


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
        found = SceneResult(self.model.grid_box(*scene.image.shape[:2]), encoded)
        names, protocol = sample_names(scene), protocol_of(self.protocol)
        for queries in protocol.batches(protocol.asked(len(scene.queries), number, self.seed), self.model):
            batch = Batch(number, queries, [names[query] for query in queries], scene.only(queries), encoding)
            self._run_batch(batch, contenders, attempt, found)
        return found

    def segment(self, encoded: Any, scene: Scene, strategy: Strategy | None) -> Answers:
        """The answers to all queries of a scene."""
        return protocol_of(self.protocol).answers(self.model, encoded, scene, strategy)

    def _run_batch(
        self, batch: Batch, contenders: dict[int, Contender], attempt: Attempt[Any], found: SceneResult
    ) -> None:
        reference: Answers | None = None
        results: dict[int, Answers] = {}
        times: dict[int, dict[str, float]] = {}
        for key, contender in contenders.items():
            strategy = contender.strategy.reseeded(batch.number + self.seed)
            with recorded() as taken:
                result = attempt(key, partial(self.segment, found.encoded, batch.scene, strategy))
            if result is None:
                continue
            results[key] = result
            times[key] = {**batch.encoding, **taken, TOTAL: batch.encoding[TOTAL] + taken[TOTAL]}
            if reference is None and result.trace is not None and not result.trace.stages:
                reference = result  # without a decision the model is untouched
        if not results:
            return
        full = masks_of(reference or self.segment(found.encoded, batch.scene, None))
        for key, result in results.items():
            made = self._records(batch, result, full, times[key], contenders[key].label, found.box)
            found.records.setdefault(key, []).extend(made)
        found.calls.append((batch, results))
        first = next(iter(results.values()))
        assert first.trace is not None
        rows = first.row_index
        found.untouched.extend(self._cost(first.trace, row, rows.count(row), unpruned=True) for row in rows)

    def _records(
        self, batch: Batch, result: Answers, full: list[Bits], times: dict[str, float], label: str, box: Box
    ) -> list[Record]:
        trace, rows, found = result.trace, result.row_index, []
        assert trace is not None
        for place, (query, mask) in enumerate(zip(batch.scene.queries, masks_of(result), strict=True)):
            wanted, row = query.mask, rows[place]
            overlap, matched = metrics.overlap(mask, wanted), None
            if result.logits:
                overlap, matched = matched_overlap(result.logits[place], targets_of(query), ignored(wanted))
            given = Measured(mask, wanted, full[place], query, trace, row, label) if self.added else None
            record = Record(
                scene=batch.number,
                query=batch.queries[place],
                sample=batch.names[place],
                kind=query.kind,
                size=metrics.size_of(wanted),
                overlap=overlap,
                predicted=metrics.predicted_pixels(mask, wanted),
                agreement=metrics.overlap(mask, full[place]),
                coverage=target_coverage(wanted, trace, row, box),
                cost=self._cost(trace, row, rows.count(row)),
                layers=tuple(entry.image[row] for entry in trace.ledger.entries),
                milliseconds={step: value / len(batch.queries) for step, value in times.items()},
                metrics={metric.name: measure(metric, given) for metric in self.added} if given else {},
                mask=mask if self.keep_masks else None,
                stages=stages_of(trace, row, box) if self.keep_masks else (),
                matched=matched,
            )
            found.append(record)
        return found

    def _cost(self, trace: Trace, row: int, sharing: int, unpruned: bool = False) -> QueryCost:
        ledger = row_ledger(trace.ledger, row)
        return query_cost(ledger.unpruned() if unpruned else ledger, self.spec, self.element_bytes, sharing)


def sample_names(scene: Scene) -> list[str]:
    """A name for each query of a scene: its own, or "scene#number"."""
    return [query.id or f"{scene.id}#{number}" for number, query in enumerate(scene.queries)]


def targets_of(query: Query) -> list[NDArray[np.bool_]]:
    """The single targets of a query: its own, or its whole target."""
    return list(query.targets) or [foreground(query.mask)]


def matched_overlap(logits: Tensor, targets: list[Bits], without: Bits | None = None) -> tuple[tuple[int, int], float]:
    """Intersection and union over all masks and targets matched one to one, and their mean IoU, as in PixelLM's
    evaluation: what has no partner meets an empty mask, and two empty masks count 1, as everywhere.

    Args:
        logits: float [n, H, W].
        targets: bool [H, W] each; empty ones are left out.
        without: bool [H, W], pixels that do not count, neither in the matching nor in the overlaps.
    """
    counted = np.ones(targets[0].shape, dtype=np.bool_) if without is None else ~without
    scores = logits[:, torch.from_numpy(counted).to(logits.device)][:, None]  # [n, 1, counted pixels]
    masks = (scores > 0).cpu().numpy()
    wanted = [target[counted][None] for target in targets if target[counted].any()]
    pairs: list[tuple[int, int]] = []
    if len(masks) and wanted:
        pairs = match_masks(scores, torch.from_numpy(np.stack(wanted)).to(logits.device))
    overlaps = [metrics.overlap(masks[mask], wanted[target]) for mask, target in pairs]
    lonely = [mask for number, mask in enumerate(masks) if number not in {pair[0] for pair in pairs}]
    missed = [target for number, target in enumerate(wanted) if number not in {pair[1] for pair in pairs}]
    overlaps += [(0, int(alone.sum())) for alone in [*lonely, *missed]]
    both = (sum(pair[0] for pair in overlaps), sum(pair[1] for pair in overlaps))
    return both, metrics.giou(overlaps) if overlaps else 1.0  # no target, and none predicted


def masks_of(result: Answers) -> list[NDArray[np.bool_]]:
    """The masks as arrays, bool [H, W] each."""
    return list(result.masks.detach().cpu().numpy())
