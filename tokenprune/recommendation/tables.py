"""A recommendation as Rich tables."""

from __future__ import annotations

import re
from textwrap import shorten
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from tokenprune.utils.split_tables import Column, Parted

if TYPE_CHECKING:
    from tokenprune.recommendation.results import Advice, BreakEven, Recommendation, Times, Timing

MISSING = "–"
NAMED = 3  # that a line names
LONGEST = 80  # characters of a reason
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
    """What it comes to, break-even points with accuracies, ratios, times, what fits, and what was left out and why."""
    head = f": {found.layers} layers of width {found.hidden}, {found.text_tokens} text tokens, {found.rounds} rounds"
    parts: list[RenderableType] = [_note(head, found.model)]
    ran = [advice for advice in found.strategies if advice.reason is None]
    if ran:
        parts += [*_conclusion(found, ran), *_break_even(found, ran), *_ratios(found, ran), *_times(found, ran)]
    if found.fits:
        parts += _fits(found)
    elif found.budget_ms is not None:
        parts.append(_note(f"Nothing fits into {found.budget_ms:g} ms."))
    parts += [_note(f"{one.image_tokens} image tokens, batch {one.batch}: {one.reason}") for one in found.left_out]
    return Group(*parts, *_failures(found))


def _conclusion(found: Recommendation, ran: list[Advice]) -> list[RenderableType]:
    """For each size, how many save time, and the best of these: by gIoU where it is known, else by time."""
    lines: list[RenderableType] = []
    for batch, tokens in _sizes(found):
        timed = [(advice, timing) for advice in ran if (timing := _timing(found, advice, (batch, tokens))) is not None]
        paying = [(advice, timing) for advice, timing in timed if timing.pays and timing.ratio is not None]
        head = f"{tokens} image tokens, batch {batch}: {len(paying)} of {len(timed)} save time"
        known = [(advice.accuracy[0].giou, timing) for advice, timing in paying if advice.accuracy]
        if known:
            giou, best = max(known, key=lambda pair: pair[0])
            head += f"; of these {best.label} has the highest known gIoU ({giou:.3f}), and takes {best.ratio:.2f} of it"
        elif paying:
            best = min((timing for _, timing in paying), key=lambda timing: timing.ratio or 0)
            head += f"; the fastest, {best.label}, takes {best.ratio:.2f} of it"
        lines.append(_note(f"{head}."))
    return lines


def _failures(found: Recommendation) -> list[RenderableType]:
    """A line for each reason, with all that did not run for it; `Recommendation` has the whole reasons."""
    names: dict[str, list[str]] = {}
    everywhere = {advice.label for advice in found.strategies if advice.reason is not None}
    for advice in found.strategies:
        if advice.reason is not None:
            names.setdefault(_short(advice.reason), []).append(advice.label)
    for timing in found.timings:
        if timing.reason is not None and timing.label not in everywhere:
            size = f"{timing.label} with {timing.image_tokens} image tokens, batch {timing.batch}"
            names.setdefault(_short(timing.reason), []).append(size)
    lines = [_note(f" did not run: {reason}", _named(those)) for reason, those in names.items()]
    return [*lines, *([_note("Whole reasons: --format json, or .timings and .strategies in Python.")] if lines else [])]


def _short(reason: str) -> str:
    """The first clause of a reason, without the strategy and the model, which are named already."""
    own = re.sub(r"^strategy '[^']*':? (is incompatible with model '[^']*': )?", "", reason)
    return shorten(re.split(r"; |, model provides ", own, maxsplit=1)[0], LONGEST, placeholder=" …")


def _named(names: list[str]) -> str:
    first, more = names[:NAMED], len(names) - NAMED
    return ", ".join(first) + (f" and {more} more" if more > 0 else "")


def _break_even(found: Recommendation, ran: list[Advice]) -> list[RenderableType]:
    columns = []
    for batch in dict.fromkeys(one.batch for advice in ran for one in advice.break_even):
        points = [next((one for one in advice.break_even if one.batch == batch), None) for advice in ran]
        columns.append(Column(f"pays from, batch {batch}", [_point(point) for point in points]))
    notes = [_note(BREAK_EVEN)]
    sources = list(dict.fromkeys((one.model, one.dataset, one.split) for advice in ran for one in advice.accuracy))
    for source in sources:
        known = [
            next((one for one in advice.accuracy if (one.model, one.dataset, one.split) == source), None)
            for advice in ran
        ]
        columns.append(Column("gIoU", [MISSING if one is None else f"{one.giou:.3f}" for one in known]))
        agree = [MISSING if one is None or one.agreement is None else f"{one.agreement:.3f}" for one in known]
        columns.append(Column("agree", agree))
        samples = max(one.samples for one in known if one is not None)
        about = "" if source[0] == found.model else "; yours may differ"
        notes.append(
            _note(f"gIoU, agree: measured on {source[0]} ({source[1]}, {source[2]}, {samples} queries){about}.")
        )
    return [_table("image tokens from which it pays", ran, columns), *notes]


def _point(point: BreakEven | None) -> str:
    if point is None or point.image_tokens is None:
        return NOT_SHOWN
    beyond = ", ".join(map(str, point.not_shown_at))
    return f"{point.image_tokens} (not shown at {beyond})" if beyond else str(point.image_tokens)


def _ratios(found: Recommendation, ran: list[Advice]) -> list[RenderableType]:
    columns = [
        Column(_head(found, size), [_ratio(_timing(found, advice, size)) for advice in ran]) for size in _sizes(found)
    ]
    return [_table("time relative to no pruning, by image tokens", ran, columns), _note(RATIO)]


def _ratio(timing: Timing | None) -> str:
    if timing is None or timing.ratio is None:
        return MISSING
    if timing.ratio_low is None or timing.ratio_high is None:
        return f"{timing.ratio:.2f}"
    return f"{timing.ratio:.2f} ({timing.ratio_low:.2f}–{timing.ratio_high:.2f})"


def _times(found: Recommendation, ran: list[Advice]) -> list[RenderableType]:
    columns = []
    for size in _sizes(found):
        timings = [_timing(found, advice, size) for advice in ran]
        without = next((timing.none for timing in timings if timing is not None and timing.none is not None), None)
        cells = [_ms(without), *(_ms(None if timing is None else timing.prefill) for timing in timings)]
        columns.append(Column(_head(found, size), cells))
    names = Column("strategy", ["none", *(advice.label for advice in ran)])
    table = Parted("milliseconds, by image tokens", names, [(columns, "")], justify="left")
    return [table, _note("Median over rounds of one batch's prefill, in brackets the minimum.")]


def _ms(times: Times | None) -> str:
    return MISSING if times is None else f"{times.median_ms:.4g} ({times.min_ms:.4g})"


def _fits(found: Recommendation) -> list[RenderableType]:
    """A row for each strategy that fits somewhere, a column for each size."""
    cells = {(fit.label, fit.batch, fit.image_tokens): f"{fit.median_ms:.4g}" for fit in found.fits}
    names = list(dict.fromkeys(fit.label for fit in found.fits))
    columns = [
        Column(_head(found, size), [cells.get((name, *size), MISSING) for name in names]) for size in _sizes(found)
    ]
    title = f"within {found.budget_ms:g} ms, by image tokens"
    table = Parted(title, Column("strategy", names), [(columns, "")], justify="left")
    text = f"Median ms where the upper end of its 95 % interval is within {found.budget_ms:g} ms; none: no pruning."
    return [table, _note(text)]


def _table(title: str, ran: list[Advice], columns: list[Column]) -> Parted:
    return Parted(title, Column("strategy", [advice.label for advice in ran]), [(columns, "")], justify="left")


def _sizes(found: Recommendation) -> list[tuple[int, int]]:
    measured = {(timing.batch, timing.image_tokens) for timing in found.timings if timing.ratio is not None}
    return sorted(measured)


def _head(found: Recommendation, size: tuple[int, int]) -> str:
    batch, tokens = size
    several = len({batch for batch, _ in _sizes(found)}) > 1
    return f"{tokens}, batch {batch}" if several else str(tokens)


def _timing(found: Recommendation, advice: Advice, size: tuple[int, int]) -> Timing | None:
    for timing in found.timings:
        if (timing.batch, timing.image_tokens) == size and timing.label == advice.label:
            return timing
    return None


def _note(text: str, name: str = "") -> Padding:
    return Padding(Text.assemble((name, "bold"), text), (0, 1))
