"""Runs the two strategies of the page on one query, as `tokenprune compare` does, beside the model without pruning."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch

from tokenprune import api
from tokenprune.core.budget import budget_words
from tokenprune.core.strategy import Strategy
from tokenprune.demo.pictures import Asked, Single
from tokenprune.errors import InputError, TokenPruneError
from tokenprune.evaluation import metrics
from tokenprune.evaluation.comparison.compare import compare
from tokenprune.evaluation.comparison.results import Comparison, Row
from tokenprune.evaluation.contenders import Contender, contenders
from tokenprune.evaluation.models import SegmentationModel, TurnTaking
from tokenprune.evaluation.samples import Outcome, SampleRecord
from tokenprune.evaluation.scene_run import SceneRun
from tokenprune.utils.threads import ThreadChoice, using

T = TypeVar("T")

BUDGETS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
ROUNDS = 3  # measured prefills of each strategy
Request = Callable[[], Strategy]
"""Makes the strategy of a side of the page; raises a TokenPruneError if its options are wrong."""


@dataclass(frozen=True, eq=False)
class Ran:
    """What one strategy gave.

    Attributes:
        label: the strategy with its options and budget.
        row: its numbers; None if it could not run.
        outcome: its mask and trace; None if it could not run.
        problem: why it could not run; empty if it did.
    """

    label: str
    row: Row | None = None
    outcome: Outcome | None = None
    problem: str = ""


@dataclass(frozen=True, eq=False)
class Result:
    """What the page shows.

    Attributes:
        record: the picture, the query, and the target if it is known.
        untouched: the model without pruning.
        sides: the strategies.
    """

    record: SampleRecord
    untouched: Ran
    sides: list[Ran]


@dataclass(frozen=True)
class Point:
    """A point of the curve.

    Attributes:
        strategy: its label, without the budget.
        budget: the budget.
        value: gIoU against the target, or against the mask without pruning where no target is known.
    """

    strategy: str
    budget: float
    value: float


def once(
    model: SegmentationModel, asked: Asked, requests: Sequence[Request], threads: ThreadChoice | None = None
) -> Result:
    """Run strategies on one query. A strategy that cannot run is a side with the reason; the others run.

    Raises:
        InputError: the model cannot use the picture or the query.
    """
    chosen = [_tried(request) for request in requests]
    strategies = _distinct([api.strategy("none"), *(one for one in chosen if isinstance(one, Strategy))])
    found = compare(
        model,
        Single(asked.scene),
        strategies,
        split="only",
        limit=1,
        timing_samples=1,
        timing_rounds=ROUNDS,
        records=1,
        extra_metrics=[],
        threads=threads,
    )
    record = found.records[0]
    if not asked.has_target:
        record = replace(record, target=None, outcomes=[replace(one, iou=None) for one in record.outcomes])
    ran = {_key(strategy): one for strategy, one in zip(strategies, _ran(found, record, strategies), strict=True)}
    sides = [ran[_key(one)] if isinstance(one, Strategy) else Ran("", problem=one) for one in chosen]
    return Result(record, ran[_key(strategies[0])], sides)


def curve(
    model: SegmentationModel,
    asked: Asked,
    requests: Sequence[Callable[[float], Strategy]],
    threads: ThreadChoice | None = None,
) -> tuple[list[Point], list[str]]:
    """Run strategies at every budget of `BUDGETS`, and once without pruning.

    Args:
        model, asked, threads: as in `once`.
        requests: make the strategy of a side for a budget.

    Returns:
        The points, and why strategies could not run. One whose budget does not move is at all budgets.

    Raises:
        InputError: the model cannot use the picture or the query.
    """
    strategies: dict[tuple[str, str], Strategy] = {}
    budgets: dict[tuple[str, str], dict[float, None]] = {}  # of one whose budget does not move: all of them
    problems: dict[str, str] = {}
    for request in (lambda budget: api.strategy("none"), *requests):
        for budget in BUDGETS:
            made = _tried(partial(request, budget))
            if isinstance(made, str):
                problems[made] = made
                continue
            strategies[_key(made)] = made
            budgets.setdefault(_key(made), {})[budget] = None
    runs = dict(enumerate(contenders([*strategies.values()], 1.0)))
    at = [[*one] for one in budgets.values()]

    def attempt(number: int, run: Callable[[], T]) -> T | None:
        try:
            return run()
        except InputError:
            raise
        except TokenPruneError as error:
            problems[_line(runs[number], at[number])] = one_line(error)
            return None

    with torch.no_grad(), using(threads):
        found = SceneRun(TurnTaking(model)).run(asked.scene, 0, runs, attempt)
    points = []
    for number, (record,) in found.records.items():
        value = metrics.giou([record.overlap if asked.has_target else record.agreement])
        points += [Point(_line(runs[number], at[number]), budget, value) for budget in at[number]]
    return points, list(problems.values())


def _line(run: Contender, budgets: list[float]) -> str:
    """What the curve calls a strategy: without its budget, if that moves."""
    return run.label.removesuffix(budget_words(run.strategy)) if len(budgets) == 1 else run.label


def _tried(request: Request) -> Strategy | str:
    """The strategy, or why there is none."""
    try:
        return request()
    except TokenPruneError as error:
        return one_line(error)


def one_line(error: BaseException | str) -> str:
    """A message without line breaks."""
    return " ".join(str(error).split())


def _distinct(strategies: list[Strategy]) -> list[Strategy]:
    """Without those that would run equally."""
    return list({_key(strategy): strategy for strategy in strategies}.values())


def _key(strategy: Strategy) -> tuple[str, str]:
    return strategy.name, repr(strategy)


def _ran(found: Comparison, record: SampleRecord, strategies: list[Strategy]) -> Iterator[Ran]:
    """The rows of a comparison with their outcomes, in the order of the strategies."""
    outcomes = {outcome.label: outcome for outcome in record.outcomes}
    for contender, row in zip(contenders(strategies, 1.0), found.rows, strict=True):
        if row.reason is None:
            yield Ran(contender.label, row, outcomes[contender.label])
        else:
            yield Ran(contender.label, problem=one_line(row.reason))
