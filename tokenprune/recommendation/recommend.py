"""`recommend`: measure strategies on this machine, and say which save time, from how many image tokens on."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import partial
from numbers import Real
from pathlib import Path
from types import NoneType
from typing import Any

import torch

from tokenprune import api
from tokenprune.core.strategy import Strategy
from tokenprune.core.trace import Trace
from tokenprune.engine import model_turn
from tokenprune.errors import OptionError, TokenPruneError
from tokenprune.evaluation import environment
from tokenprune.evaluation.contenders import Contender, contenders
from tokenprune.plugins import registry
from tokenprune.recommendation.decoders import MeasuredDecoder
from tokenprune.recommendation.intervals import break_even, median_interval
from tokenprune.recommendation.known_accuracy import accuracies_in, bundled_accuracies
from tokenprune.recommendation.results import (
    Accuracy,
    Advice,
    BreakEven,
    LeftOut,
    Recommendation,
    Times,
    Timing,
    fitting,
)
from tokenprune.recommendation.rounds import MOST, Cell, Progress, Rounds
from tokenprune.utils.arguments import instance, listed, shown, whole_number
from tokenprune.utils.threads import ThreadChoice, checked, using

IMAGE_TOKENS = (64, 144, 256, 576)
BUDGETS = (0.35,)
BUDGETS_FOR_MS = (0.5, 0.35, 0.2)  # with budget_ms: some that might fit
SECONDS = 60.0


def recommend(
    model: Any,
    strategies: str | Strategy | Sequence[str | Strategy] | None = None,
    budget: float | Sequence[float] | None = None,
    *,
    image_tokens: int | Sequence[int] | None = None,
    batch: int | Sequence[int] = 1,
    budget_ms: float | None = None,
    text_tokens: int = 36,
    seconds: float = SECONDS,
    rounds: int = MOST,
    results: str | Path | None = None,
    name: str | None = None,
    progress: Progress | None = None,
    threads: int | ThreadChoice | None = None,
) -> Recommendation:
    """Measure which strategies save time on this machine, from how many image tokens and which batch size on.

    Prefills of the model's decoder are timed on random states of the requested sizes, with every strategy and without
    pruning, in turn. A strategy's own work counts; what the vision tower would have to compute for it does not, its
    answers are random values of the right sizes. Accuracies are looked up, see `results`.

    Args:
        model: a model as `tokenprune.load` gives it, or an argument of `tokenprune.load`.
        strategies: as in `tokenprune.compare`; None = all that take a budget.
        budget: equivalent image tokens as a share of all, in (0, 1]; one or several. None = 0.35, or with `budget_ms`
            0.5, 0.35 and 0.2.
        image_tokens: image tokens of one prompt; one or several numbers. None = 64, 144, 256 and 576, as far as the
            decoder takes them.
        batch: prompts in a batch; one or several numbers.
        budget_ms: milliseconds that a batch's prefill may take; the result lists what fits.
        text_tokens: of one prompt.
        seconds: for measuring; the model's own number of image tokens comes first, then the others by their size, and
            those for which there is no time are left out.
        rounds: measured runs of everything at most; with fewer than 6 nothing is shown.
        results: where to look accuracies up: the folder of a sweep, or what `tokenprune compare --out` wrote. None =
            the results that bundled models come with.
        name: of the model, in the result and for looking accuracies up; None = as requested, or its own.
        progress: called with (name of the phase, steps done, total steps).
        threads: processor threads, set for the whole process meanwhile; None = unchanged.

    Raises:
        CheckpointError: the model cannot be loaded.
        UnsupportedError: it contains no decoder, or no adapter supports it.
        UnknownNameError: no such strategy.
        OptionError: a number that is out of range or exceeds the decoder's positions, or too few seconds for anything.
        BudgetError: a budget outside (0, 1].
        IncompatibleError, or another error of the first strategy: none can run on the model.
        InputError: `results` cannot be read.

    Examples:
        >>> import tokenprune as tp
        >>> found = tp.recommend("lisa-tiny", ["fastv", "cdpruner"], image_tokens=64, rounds=1)
        >>> [(row.strategy, row.reason is None) for row in found.strategies]
        [('fastv', True), ('cdpruner', False)]
        >>> found.strategies[0].accuracy[0].model
        'lisa-tiny'
    """
    _positive("seconds", seconds)
    if budget_ms is not None:
        _positive("budget_ms", budget_ms)
    whole_number("text_tokens", text_tokens, 1)
    whole_number("rounds", rounds, 1)
    sizes = None if image_tokens is None else _numbers("image_tokens", image_tokens)
    batches = _numbers("batch", batch)
    instance("name", name, (str, NoneType), "a text")
    if progress is not None and not callable(progress):
        raise OptionError(f"progress={shown(progress)} found, expected a function of (what, done, total)")
    if not isinstance(threads, ThreadChoice):
        checked(threads)
    if budget is None:
        budget = BUDGETS if budget_ms is None else BUDGETS_FOR_MS
    field_of = contenders(_all_names() if strategies is None else strategies, budget)
    known = bundled_accuracies() if results is None else accuracies_in(results)
    if isinstance(model, (str, Path)):
        name, model = str(model) if name is None else name, api.load(model)
    measured = MeasuredDecoder(model, text_tokens)
    # a folder's name may be invalid Unicode, which JSON cannot hold
    name = (measured.name if name is None else name).encode(errors="replace").decode()
    sizes = _within(measured, sizes)
    reasons = {number: reason for number, one in enumerate(field_of) if (reason := _refusal(measured, one))}
    if len(reasons) == len(field_of):
        measured.check(field_of[0].strategy)  # raises its error
        raise OptionError(next(iter(reasons.values())))
    runs = {number: one.strategy for number, one in enumerate(field_of) if number not in reasons}
    traces: dict[tuple[int, int], dict[int, Trace]] = {}
    with torch.no_grad(), using(threads) as chosen:
        cells = [measured.cell(n, b, runs, traces.setdefault((n, b), {})) for b in batches for n in sizes]
        alone = partial(model_turn, measured.module)
        own = measured.tower_tokens
        done = Rounds(cells, seconds, rounds, alone=alone, progress=progress or _silent, first=own).run()
    if not done:
        raise _no_time(cells, seconds)
    timings = [
        _timing(cell, number, one, traces[cell.image_tokens, cell.batch].get(number))
        for number, one in enumerate(field_of)
        for cell in cells
        if number not in reasons and not cell.needs
    ]
    if all(timing.reason for timing in timings):
        raise OptionError(f"strategies: none could run; {timings[0].reason}")
    rows = [_advice(one, reasons.get(number), timings, known.of(one, name)) for number, one in enumerate(field_of)]
    return Recommendation(
        model=name,
        layers=measured.layers,
        hidden=measured.hidden,
        text_tokens=text_tokens,
        seconds=seconds,
        rounds=done,
        budget_ms=budget_ms,
        environment=environment.describe(measured.module, chosen),
        strategies=sorted(rows, key=partial(_place, timings)),
        timings=timings,
        left_out=[_left_out(cell, seconds) for cell in cells if cell.needs],
        fits=fitting(timings, budget_ms),
    )


def _silent(what: str, done: int, total: int) -> None:
    """No progress."""


def _all_names() -> list[str]:
    """All strategies that take a budget and have none of their own; those that cannot be made are left out."""
    found = []
    for name in registry.strategies():
        try:
            made = api.strategy(name)
        except TokenPruneError:
            continue  # `tokenprune list --plugins` says why
        if made.takes_budget() and made.budget is None:
            found.append(name)
    return found


def _positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < math.inf:
        raise OptionError(f"{name}: {shown(value)} found, expected a number above 0")


def _numbers(name: str, value: int | Sequence[int]) -> list[int]:
    found = [whole_number(name, one, 1) for one in listed(value)]
    if not found:
        raise OptionError(f"{name}: an empty list found, expected at least one whole number")
    return list(dict.fromkeys(found))


def _within(measured: MeasuredDecoder, sizes: list[int] | None) -> list[int]:
    """The numbers of image tokens, none of them beyond the decoder's positions."""
    most = measured.most_image_tokens
    if sizes is None:
        sizes = [size for size in IMAGE_TOKENS if size <= most] or [max(most, 1)]
    if max(sizes) > most:
        raise OptionError(
            f"image_tokens: {max(sizes)} found, but {measured.name} takes prompts of {most + measured.text_tokens} "
            f"tokens, {measured.text_tokens} of them text; give at most {max(most, 0)}"
        )
    return sorted(sizes)


def _refusal(measured: MeasuredDecoder, contender: Contender) -> str:
    """Why a contender cannot run on this model; empty if nothing is known against it."""
    try:
        measured.check(contender.strategy)
    except TokenPruneError as error:
        return str(error)
    return ""


def _timing(cell: Cell, number: int, contender: Contender, trace: Trace | None) -> Timing:
    own, without = cell.seconds.get(number, []), cell.seconds[None]
    names: dict[str, Any] = {
        "strategy": contender.strategy.name,
        "given": contender.given,
        "budget": contender.budget,
        "image_tokens": cell.image_tokens,
        "batch": cell.batch,
        "none": Times.of(without),
    }
    if number in cell.reasons:
        return Timing(**names, reason=cell.reasons[number])
    ratios = [one / other for one, other in zip(own, without, strict=True)]
    low, high = median_interval(ratios) or (None, None)
    return Timing(
        **names,
        rounds=len(own),
        equivalent_tokens_ratio=None if trace is None else trace.ledger.equivalent_tokens_ratio,
        prefill=Times.of(own),
        ratio=statistics.median(ratios),
        ratio_low=low,
        ratio_high=high,
        ratio_of_minima=min(own) / min(without),
    )


def _advice(contender: Contender, reason: str | None, timings: Sequence[Timing], accuracy: list[Accuracy]) -> Advice:
    made = Advice(
        strategy=contender.strategy.name,
        given=contender.given,
        budget=contender.budget,
        accuracy=accuracy,
        reason=reason,
    )
    own = [timing for timing in timings if timing.label == made.label]
    ran = [timing for timing in own if timing.reason is None]
    if not ran:
        return made.model_copy(update={"reason": reason or own[0].reason})
    points = []
    for batch in dict.fromkeys(timing.batch for timing in ran):
        bounds = {timing.image_tokens: timing.ratio_high for timing in ran if timing.batch == batch}
        first, beyond = break_even(bounds)
        points.append(BreakEven(batch=batch, image_tokens=first, not_shown_at=beyond))
    return made.model_copy(update={"break_even": points})


def _place(timings: Sequence[Timing], advice: Advice) -> tuple[float, ...]:
    """The order of the result: those that ran, by break-even points, then by the ratio at the most image tokens."""
    ratios = {
        (timing.batch * timing.image_tokens): timing.ratio
        for timing in timings
        if timing.label == advice.label and timing.ratio is not None
    }
    points = [math.inf if point.image_tokens is None else point.image_tokens for point in advice.break_even]
    last = ratios[max(ratios)] if ratios else math.inf
    return (advice.reason is not None, min(points, default=math.inf), last)


def _left_out(cell: Cell, seconds: float) -> LeftOut:
    why = f"left out: it needs about {_rounded(cell.needs)} s, and the others leave less of {seconds:g} s; allow more"
    return LeftOut(image_tokens=cell.image_tokens, batch=cell.batch, reason=why)


def _no_time(cells: Sequence[Cell], seconds: float) -> OptionError:
    least = min(cells, key=lambda cell: cell.needs)
    return OptionError(
        f"seconds: {seconds:g} found, but {least.image_tokens} image tokens at batch {least.batch} alone need about "
        f"{_rounded(least.needs)} s; allow more, or measure fewer strategies or image tokens"
    )


def _rounded(seconds: float) -> int:
    """Rounded up to two digits: an estimate."""
    unit = int(10 ** max(int(math.log10(max(seconds, 1))) - 1, 0))
    return math.ceil(seconds / unit) * unit
