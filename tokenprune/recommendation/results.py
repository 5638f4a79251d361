"""The result of `recommend`: times, break-even points and known accuracies, as JSON and as tables."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, computed_field

from tokenprune.errors import BudgetError
from tokenprune.recommendation.intervals import median_interval

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class _Row(_Frozen):
    """What rows of one strategy, with its given options, at one budget share."""

    strategy: str
    given: dict[str, Any] = {}
    budget: float | None = None

    @property
    def label(self) -> str:
        """Name, given options and budget: "csp (query=seg) at 0.35"."""
        given = ", ".join(f"{key}={value}" for key, value in self.given.items())
        name = f"{self.strategy} ({given})" if given else self.strategy
        return name if self.budget is None else f"{name} at {self.budget:g}"


class Accuracy(_Frozen):
    """An accuracy measured earlier, on the model and dataset that it names.

    Attributes:
        model, dataset, split, samples: what it was measured on.
        giou: mean IoU against the targets.
        agreement: mean IoU against the untouched model's masks; None if it was not stored.
    """

    model: str
    dataset: str
    split: str
    samples: int
    giou: float
    agreement: float | None = None


class Times(_Frozen):
    """Milliseconds of one batch's prefill, over rounds.

    Attributes:
        median_ms, min_ms: median and minimum.
        low_ms, high_ms: 95 % interval of the median; None with fewer than 6 rounds.
    """

    median_ms: float
    min_ms: float
    low_ms: float | None = None
    high_ms: float | None = None

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times:
        """From the seconds of each round, at least one."""
        low, high = median_interval(seconds) or (None, None)
        return cls(
            median_ms=1e3 * statistics.median(seconds),
            min_ms=1e3 * min(seconds),
            low_ms=None if low is None else 1e3 * low,
            high_ms=None if high is None else 1e3 * high,
        )


class Timing(_Row):
    """One strategy at one number of image tokens and one batch size, beside no pruning in the same rounds.

    Attributes:
        strategy, given, budget: the strategy, the options that the user gave, and its budget.
        image_tokens: of each row of the batch.
        batch: rows.
        rounds: measured runs of each.
        equivalent_tokens_ratio: mean over decoder layers of the image tokens entering the layer, as a share of all.
        prefill: the times of the prefill with the strategy's own work; None if it could not run.
        none: the times without pruning.
        ratio: median over rounds of the time with the strategy, divided by that without pruning in the same round.
        ratio_low, ratio_high: 95 % interval of that median; None with fewer than 6 rounds.
        ratio_of_minima: of the shortest times: what the work takes undisturbed.
        reason: why it could not run; None if it did.
    """

    image_tokens: int
    batch: int
    rounds: int = 0
    equivalent_tokens_ratio: float | None = None
    prefill: Times | None = None
    none: Times | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    ratio_of_minima: float | None = None
    reason: str | None = None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def pays(self) -> bool:
        """Whether the times show that the strategy saves time: the upper bound of the ratio is below 1."""
        return self.ratio_high is not None and self.ratio_high < 1


class BreakEven(_Frozen):
    """From how many image tokens on a strategy saves time, at one batch size.

    Attributes:
        batch: rows.
        image_tokens: the smallest measured number at which it is shown; None if it is shown at none.
        not_shown_at: larger measured numbers at which it is not shown.
    """

    batch: int
    image_tokens: int | None = None
    not_shown_at: list[int] = []


class Advice(_Row):
    """What is known of one strategy at one budget.

    Attributes:
        strategy, given, budget: as in `Timing`.
        break_even: for each batch size.
        accuracy: on the same model, if known, else on others.
        reason: why it could not run at all; None if it did.
    """

    break_even: list[BreakEven] = []
    accuracy: list[Accuracy] = []
    reason: str | None = None


class LeftOut(_Frozen):
    """A number of image tokens and a batch size for which there was no time."""

    image_tokens: int
    batch: int
    reason: str


class Fit(_Row):
    """A prefill within `budget_ms`: the upper bound of its median time is. "none" is no pruning."""

    image_tokens: int
    batch: int
    median_ms: float
    high_ms: float


class Recommendation(_Frozen):
    """Which strategies save time on this machine. Printing it (`rich.print`, or `print`) shows the tables.

    Attributes:
        model: its name.
        layers, hidden: decoder layers, and the width of a token's state.
        text_tokens: of every prompt.
        seconds: the time that was allowed for measuring.
        rounds: measured runs of everything.
        budget_ms: milliseconds that a prefill may take, if given.
        environment: versions, machine, threads.
        strategies: by what they save: an early break-even point first, then a low ratio at the most image tokens.
        timings: for every strategy, budget, number of image tokens and batch size.
        left_out: sizes for which there was no time.
        fits: what fits into `budget_ms`, fastest first; empty without it.
    """

    model: str
    layers: int
    hidden: int
    text_tokens: int
    seconds: float
    rounds: int
    budget_ms: float | None = None
    environment: dict[str, str | int]
    strategies: list[Advice]
    timings: list[Timing]
    left_out: list[LeftOut] = []
    fits: list[Fit] = []

    def check_fits(self) -> None:
        """Raise BudgetError if `budget_ms` was given and nothing fits into it; the message names the fastest."""
        if self.budget_ms is None or self.fits:
            return
        found = [(timing.prefill, timing) for timing in self.timings if timing.prefill is not None]
        times, fastest = min(found, key=lambda pair: pair[0].high_ms or pair[0].median_ms)
        least = times.high_ms or times.median_ms
        raise BudgetError(
            f"--budget-ms {self.budget_ms:g}: no measured prefill fits; the fastest, {fastest.label} with "
            f"{fastest.image_tokens} image tokens and batch {fastest.batch}, takes up to {least:.3g} ms; allow more "
            "milliseconds, or measure smaller budgets or fewer image tokens"
        )

    def to_json(self, indent: int | None = 2) -> str:
        """One JSON object with all attributes."""
        return self.model_dump_json(indent=indent)

    def table(self) -> RenderableType:
        """Break-even points and accuracies, ratios, times, and what fits, as Rich tables."""
        from tokenprune.recommendation.tables import recommendation_tables

        return recommendation_tables(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.table()

    def __str__(self) -> str:
        from tokenprune.evaluation.comparison.tables import as_text

        return as_text(self.table())


def fitting(timings: Sequence[Timing], budget_ms: float | None) -> list[Fit]:
    """What fits into that many milliseconds, for each size; no pruning too. Empty if None."""
    if budget_ms is None:
        return []
    found: list[Fit] = []
    seen: set[tuple[int, int]] = set()
    for timing in timings:
        size: dict[str, Any] = {"image_tokens": timing.image_tokens, "batch": timing.batch}
        own = {"strategy": timing.strategy, "given": timing.given, "budget": timing.budget}
        rows: list[tuple[dict[str, Any], Times | None]] = [(own, timing.prefill)]
        if (timing.image_tokens, timing.batch) not in seen and timing.none is not None:
            rows.append(({"strategy": "none"}, timing.none))
            seen.add((timing.image_tokens, timing.batch))
        for names, times in rows:
            if times is not None and times.high_ms is not None and times.high_ms <= budget_ms:
                found.append(Fit(**names, **size, median_ms=times.median_ms, high_ms=times.high_ms))
    return sorted(found, key=lambda fit: fit.median_ms)
