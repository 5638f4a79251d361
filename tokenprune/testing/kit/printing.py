"""A case and the strategy's decisions on it, as readable text."""

from __future__ import annotations

from collections.abc import Iterable

from tokenprune.core.trace import Trace
from tokenprune.testing.kit.cases import Case, Row
from tokenprune.testing.kit.decoder_families import FAMILIES, LAYERS


def show_case(case: Case) -> str:
    """The model, and the content of each row in order."""
    family = FAMILIES[case.family]
    lengths = [_length(row) for row in case.rows]
    lines = [f"model     {case.family}: {family.summary}, {LAYERS} layers", "layout    positions of each row, in order"]
    for number, (row, length) in enumerate(zip(case.rows, lengths, strict=True)):
        padding = [f"{max(lengths) - length} padding"] if length < max(lengths) else []
        parts = _parts(row)
        parts = padding + parts if case.padding == "left" else parts + padding
        lines.append(f"  row {number}   {' | '.join(parts)}   (seed {row.seed})")
    return "\n".join(lines)


def show_schedule(trace: Trace) -> str:
    """The stages: their layers, and the numbers of the image tokens that are active from there on."""
    lines = ["schedule  image tokens active from each stage on"]
    counts = trace.ledger.image_tokens
    for stage in trace.stages:
        lines.append(f"  {stage.name!r} before layer {stage.layer}: {stage.kind}")
        parked = [row.nonzero().flatten().tolist() for row in stage.parked]
        for row, kept in enumerate(stage.kept):
            waiting = f"; parked {ranges(parked[row])}" if parked[row] else ""
            lines.append(f"    row {row}: {ranges(kept)} ({len(kept)} of {counts[row]}){waiting}")
    return "\n".join(lines if trace.stages else [*lines, "  no stage: nothing is pruned"])


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers as ranges: "0-3, 7"."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(f"{a}-{b}" if b > a else str(a) for a, b in found) or "none"


def _parts(row: Row) -> list[str]:
    parts, token = [f"{row.before} text"], 0
    for number, (height, width) in enumerate(row.images):
        if number:
            parts.append("1 text")
        last = token + height * width - 1
        parts.append(f"image {number}: tokens {ranges(range(token, last + 1))}, a grid of {height} x {width}")
        token = last + 1
    return [*parts, f"{row.after} text"]


def _length(row: Row) -> int:
    return row.before + row.after + sum(h * w for h, w in row.images) + max(len(row.images) - 1, 0)
