"""How a result looks: pictures, numbers and messages as HTML, whose texts are escaped."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from importlib import resources

import jinja2

from tokenprune.demo.run import Ran, Result
from tokenprune.evaluation.comparison.results import Row
from tokenprune.evaluation.comparison.tables import si
from tokenprune.report.overlays import image_panels, single_panels

UNTOUCHED = "without pruning"


def style() -> str:
    """The style sheet of the page."""
    return _part("page.css")


def message(text: str, kind: str = "problem") -> str:
    """A line of text as a box; `kind` is "problem" or "note"."""
    return _html("message.html", text=text, kind=kind)


def picture(result: Result) -> str:
    """The picture with its target, and the mask of the model without pruning."""
    outcome = result.untouched.outcome
    assert outcome is not None
    title, mask = single_panels(result.record, outcome)[0]
    panels = [*image_panels(result.record), (f"{title}, {UNTOUCHED}", mask)]
    return _figures(panels)


def side(ran: Ran, result: Result) -> str:
    """What one strategy gave: its mask, and its tokens and scores stage by stage; or why it could not run."""
    if ran.outcome is None or ran.row is None:
        return message(ran.problem)
    lines = [("note", one) for one in (ran.row.positions_warning, ran.row.prefill_warning) if one is not None]
    return _figures(single_panels(result.record, ran.outcome)) + "".join(message(text, kind) for kind, text in lines)


def numbers(result: Result) -> str:
    """A table: a column for the model without pruning and for each strategy that ran."""
    ran = list({one.label: one for one in [result.untouched, *result.sides] if one.row is not None}.values())
    rows = [one.row for one in ran if one.row is not None]
    lines = {
        "image tokens, mean over layers": [_tokens(row) for row in rows],
        "FLOPs": [_share(_unit(si(row.flops or 0.0)), row.flops_ratio) for row in rows],
        "KV cache": [_unit(si(row.kv_bytes or 0.0, "B")) for row in rows],
        "prefill": [_time(row) for row in rows],
        "IoU with the target": [_fraction(row.giou) for row in rows] if result.record.target is not None else [],
        "agreement": [_fraction(row.agreement) for row in rows],
    }
    labels = [UNTOUCHED if one is result.untouched else one.label for one in ran]
    return _html("numbers.html", labels=labels, lines={name: cells for name, cells in lines.items() if cells})


def notes(texts: Sequence[str]) -> str:
    """Messages about strategies that could not run."""
    return "".join(message(text, "note") for text in texts)


def _tokens(row: Row) -> str:
    return _share(f"{row.equivalent_tokens or 0.0:.1f}", row.equivalent_tokens_ratio)


def _share(text: str, share: float | None) -> str:
    return text if share is None else f"{text} ({share:.0%})"


def _time(row: Row) -> str:
    if row.prefill_ms is None:
        return "–"
    faster = "" if row.prefill_speedup is None else f" ({row.prefill_speedup:.2f}×)"
    return _unit(f"{row.prefill_ms:.1f} ms") + faster


def _unit(text: str) -> str:
    """A number that is not parted from its unit."""
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def _fraction(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _figures(panels: Sequence[tuple[str, bytes]]) -> str:
    uris = [(title, f"data:image/png;base64,{base64.b64encode(png).decode()}") for title, png in panels]
    return _html("figures.html", panels=uris)


def _html(name: str, **values: object) -> str:
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_part(name)).render(**values)


def _part(name: str) -> str:
    return resources.files("tokenprune.demo").joinpath("parts").joinpath(name).read_text(encoding="utf-8")
