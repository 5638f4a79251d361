"""Answers in numbers: for each strategy and dataset the scores, with intervals, and what they cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from tokenprune.evaluation.statistics import LEVEL, Estimate
from tokenprune.sweeps.answer_sets import LARGEST
from tokenprune.sweeps.answers import Score, read_answers, stored_scores

if TYPE_CHECKING:
    import pandas as pd

TOGETHER = ["model", "dataset", "split", "protocol"]
LINE = [*TOGETHER, "label", "strategy", "given", "budget"]
DEVIATES = NormalDist().inv_cdf((1 + LEVEL) / 2)  # standard errors on each side of a 95 % interval


@dataclass(frozen=True)
class ScoreEstimate:
    """A score of all answers, with its interval.

    Attributes:
        estimate: the score; its interval is 1.96 standard errors on each side, and None without a standard error.
        stderr: the evaluator's standard error, or that of the mean; None if neither is known.
        higher_is_better: whether a larger score is a better one.
    """

    estimate: Estimate
    stderr: float | None
    higher_is_better: bool


@dataclass(frozen=True)
class AnswerLine:
    """One strategy at one budget on one dataset, over all seeds.

    Attributes:
        model, dataset, split, protocol: what it ran on.
        label: the strategy with its options and budget.
        strategy, given, budget: of it; `given` is a JSON text.
        samples: that were answered.
        image_tokens, equivalent_tokens, tokens_ratio: means, and the share of one in the other.
        flops_ratio: FLOPs of all answers, as a share of the same prompts' without pruning; None if unknown.
        scores: by metric, first those that the evaluator gave.
    """

    model: str
    dataset: str
    split: str
    protocol: str
    label: str
    strategy: str
    given: str
    budget: float | None
    samples: frozenset[str] = field(repr=False)
    image_tokens: float
    equivalent_tokens: float
    tokens_ratio: float
    flops_ratio: float | None
    scores: dict[str, ScoreEstimate] = field(default_factory=dict)

    @property
    def answers(self) -> int:
        """How many samples were answered; a sample that several seeds answered counts once."""
        return len(self.samples)

    @property
    def where(self) -> tuple[str, str, str, str]:
        """What lines must have in common to be compared."""
        return self.model, self.dataset, self.split, self.protocol

    @property
    def method(self) -> str:
        """The strategy with the options that were given, without the budget."""
        return method_of(self.strategy, self.given)


def method_of(strategy: str, given: str) -> str:
    """A strategy with the options that were given, a JSON text."""
    options = ", ".join(f"{key}={value}" for key, value in json.loads(given).items())
    return f"{strategy} ({options})" if options else strategy


def summarised_answers(run: str | Path) -> list[AnswerLine]:
    """A line for each strategy and budget of a store's answers, in the order of `tokenprune.read_answers`.

    A score that the evaluator gave counts if it is one of all answers that are stored. Of any other metric that is a
    number in each answer the mean is taken, with the standard error of a mean of independent answers.

    Raises:
        InputError: there is no such store, it cannot be read, or pandas is not installed.
    """
    table, scores = read_answers(run), stored_scores(run)
    lines: list[AnswerLine] = []
    for _, group in table.groupby(LINE, sort=False, dropna=False):
        lines.append(_line(group, scores))
    return lines


def mean_score(values: Sequence[float], higher_is_better: bool = True) -> ScoreEstimate:
    """The mean of independent values, with its standard error if there are two or more."""
    error = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    score = Score(value=float(np.mean(values)), stderr=error, higher_is_better=higher_is_better)
    return _estimate(score, len(values))


def _line(part: pd.DataFrame, scores: Mapping[str, list[tuple[int, str, Score]]]) -> AnswerLine:
    first, tokens, images = part.iloc[0], float(part.equivalent_tokens.mean()), float(part.image_tokens.mean())
    unpruned = float(part.flops_unpruned.sum())
    known = unpruned > 0 and bool(part.flops.notna().all() and part.flops_unpruned.notna().all())
    given = scores.get(str(first.configuration), ())
    found: dict[str, ScoreEstimate] = {}
    if part.configuration.nunique() == 1:  # a score of one seed is not that of several
        for count, metric, score in given:
            if count == len(part):
                found.setdefault(metric, _estimate(score, count))
    higher = {metric: score.higher_is_better for _, metric, score in given}
    for metric, values in _numbers(part.metrics.tolist()).items():
        if metric not in found:
            by_sample: dict[str, list[float]] = {}
            for sample, value in zip(part["sample"], values, strict=True):
                by_sample.setdefault(sample, []).append(value)
            means = [float(np.mean(some)) for some in by_sample.values()]  # a sample's seeds are not independent
            found[metric] = mean_score(means, higher.get(metric, True))
    return AnswerLine(
        **{name: str(first[name]) for name in LINE if name != "budget"},
        budget=None if first.budget != first.budget else float(first.budget),
        samples=frozenset(part["sample"]),
        image_tokens=images,
        equivalent_tokens=tokens,
        tokens_ratio=tokens / max(images, 1.0),
        flops_ratio=float(part.flops.sum()) / unpruned if known else None,
        scores=found,
    )


def _numbers(metrics: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """The metrics that are numbers, or yes and no, in every answer."""
    found: dict[str, list[float]] = {}
    for name in metrics[0]:
        values = [value for one in metrics if _is_number(value := one.get(name))]
        if len(values) == len(metrics):
            found[name] = [float(value) for value in values]
    return found


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and abs(value) < LARGEST


def _estimate(score: Score, count: int) -> ScoreEstimate:
    if score.stderr is None:
        return ScoreEstimate(Estimate(score.value, score.value, score.value, 1), None, score.higher_is_better)
    reach = DEVIATES * score.stderr
    estimate = Estimate(score.value, score.value - reach, score.value + reach, count)
    return ScoreEstimate(estimate, score.stderr, score.higher_is_better)
