"""A recommendation as Rich tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from tokenprune.recommendation.results import Advice, BreakEven, Times, Timing, called
from tokenprune.utils.split_tables import Column, Parted

if TYPE_CHECKING:
    from tokenprune.recommendation.results import Recommendation

MISSING = "–"
NOT_SHOWN = "not shown"
RATIO = (
    "Prefill with the strategy's own work, divided by no pruning in the same round: median and, in brackets, its 95 % "
    "interval. Below 1 it saves time."
)
BREAK_EVEN = (
    "pays from: the fewest measured image tokens at which the whole interval is below 1; not shown: at none, or too "
    "noisy to say so."
)


def recommendation_tables(found: Recommendation) -> RenderableType:
    """Break-even points with accuracies, ratios, times, what fits, and what was left out and why."""
    parts: list[RenderableType] = []
    ran = [advice for advice in found.strategies if advice.reason is None]
    if ran:
        parts += [_break_even(found, ran), _ratios(found, ran), _times(found, ran)]
    if found.fits:
        parts.append(_fits(found))
    elif found.budget_ms is not None:
        parts.append(_note(f"Nothing fits into {found.budget_ms:g} ms."))
    parts += [_note(f"{one.image_tokens} image tokens, batch {one.batch}: {one.reason}") for one in found.left_out]
    for advice in found.strategies:
        if advice.reason is not None:
            parts.append(_note(f" did not run: {advice.reason}", called(advice)))
    for timing in found.timings:
        if timing.reason is not None and all(timing.reason != advice.reason for advice in found.strategies):
            size = f" with {timing.image_tokens} image tokens, batch {timing.batch}"
            parts.append(_note(f"{size} did not run: {timing.reason}", called(timing)))
    return Group(*parts)


def _break_even(found: Recommendation, ran: list[Advice]) -> Parted:
    title = (
        f"{found.model}: {found.layers} layers of width {found.hidden}, {found.text_tokens} text tokens, "
        f"{found.rounds} rounds"
    )
    batches = list(dict.fromkeys(one.batch for advice in ran for one in advice.break_even))
    columns = []
    for batch in batches:
        points = [next((one for one in advice.break_even if one.batch == batch), None) for advice in ran]
        columns.append(Column(f"pays from, batch {batch}", [_point(point) for point in points]))
    groups = [(columns, BREAK_EVEN)]
    sources = list(dict.fromkeys((one.model, one.dataset, one.split) for advice in ran for one in advice.accuracy))
    for source in sources:
        known = [
            next((one for one in advice.accuracy if (one.model, one.dataset, one.split) == source), None)
            for advice in ran
        ]
        model, dataset, split = source
        cells = [MISSING if one is None else f"{one.giou:.3f}" for one in known]
        agree = [MISSING if one is None or one.agreement is None else f"{one.agreement:.3f}" for one in known]
        caption = f"gIoU and agreement: measured on {model} ({dataset}, {split})"
        caption += "." if model == found.model else "; yours may differ."
        groups.append(([Column("gIoU", cells), Column("agree", agree)], caption))
    return Parted(title, Column("strategy", [called(advice) for advice in ran]), groups)


def _point(point: BreakEven | None) -> str:
    if point is None or point.image_tokens is None:
        return NOT_SHOWN
    beyond = ", ".join(map(str, point.not_shown_at))
    return f"{point.image_tokens} (not shown at {beyond})" if beyond else str(point.image_tokens)


def _ratios(found: Recommendation, ran: list[Advice]) -> Parted:
    columns = []
    for size in _sizes(found):
        cells = [_ratio(_timing(found, advice, size)) for advice in ran]
        columns.append(Column(_head(found, size), cells))
    return Parted(
        "time relative to no pruning, by image tokens",
        Column("strategy", [called(advice) for advice in ran]),
        [(columns, RATIO)],
    )


def _ratio(timing: Timing | None) -> str:
    if timing is None or timing.ratio is None:
        return MISSING
    if timing.ratio_low is None or timing.ratio_high is None:
        return f"{timing.ratio:.2f}"
    return f"{timing.ratio:.2f} ({timing.ratio_low:.2f}–{timing.ratio_high:.2f})"


def _times(found: Recommendation, ran: list[Advice]) -> Parted:
    columns = []
    for size in _sizes(found):
        timings = [_timing(found, advice, size) for advice in ran]
        without = next((timing.none for timing in timings if timing is not None and timing.none is not None), None)
        cells = [_ms(without), *(_ms(None if timing is None else timing.prefill) for timing in timings)]
        columns.append(Column(_head(found, size), cells))
    names = Column("strategy", ["none", *(called(advice) for advice in ran)])
    caption = "Median over rounds of one batch's prefill, in brackets the minimum."
    return Parted("milliseconds, by image tokens", names, [(columns, caption)])


def _ms(times: Times | None) -> str:
    return MISSING if times is None else f"{times.median_ms:.4g} ({times.min_ms:.4g})"


def _fits(found: Recommendation) -> Parted:
    fits = found.fits
    columns = [
        Column("image tokens", [str(fit.image_tokens) for fit in fits]),
        Column("batch", [str(fit.batch) for fit in fits]),
        Column("median ms", [f"{fit.median_ms:.4g}" for fit in fits]),
        Column("at most", [f"{fit.high_ms:.4g}" for fit in fits]),
    ]
    caption = "at most: upper end of the median's 95 % interval; none: no pruning."
    title = f"prefills within {found.budget_ms:g} ms"
    return Parted(title, Column("strategy", [called(fit) for fit in fits]), [(columns, caption)])


def _sizes(found: Recommendation) -> list[tuple[int, int]]:
    measured = {(timing.batch, timing.image_tokens) for timing in found.timings if timing.ratio is not None}
    return sorted(measured)


def _head(found: Recommendation, size: tuple[int, int]) -> str:
    batch, tokens = size
    several = len({batch for batch, _ in _sizes(found)}) > 1
    return f"{tokens}, batch {batch}" if several else str(tokens)


def _timing(found: Recommendation, advice: Advice, size: tuple[int, int]) -> Timing | None:
    for timing in found.timings:
        if (timing.batch, timing.image_tokens) == size and called(timing) == called(advice):
            return timing
    return None


def _note(text: str, name: str = "") -> Padding:
    return Padding(Text.assemble((name, "bold"), text), (0, 1))
