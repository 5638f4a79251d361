"""The result of a tuning: as a table, as JSON, and in a sentence."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tokenprune.sweeps.summary import verdict
from tokenprune.sweeps.tuning.confirmation import DEFAULT, Row
from tokenprune.sweeps.tuning.search import Search, summed
from tokenprune.sweeps.tuning.search_space import Space

if TYPE_CHECKING:
    from rich.console import RenderableType

FILE = "tuning.json"


@dataclass(frozen=True)
class Tuned:
    """What `tune` found.

    Attributes:
        what: strategy, fixed options, budget, model, datasets, seed and values given to search.
        limit, confirm_limit, trials: as given.
        space: that was searched.
        search: every trial.
        rows: of the confirmation: the untouched model, the default, and the best combinations, best first.
    """

    what: dict[str, Any]
    limit: int
    confirm_limit: int
    trials: int
    space: Space
    search: Search
    rows: list[Row]

    @property
    def counts(self) -> dict[str, int]:
        """Combinations in the space, asked for, run, repeated and refused."""
        found = self.search
        return {
            "combinations": self.space.size,
            "asked": len(found.trials),
            "ran": len(found.ran),
            "repeated": found.repeated,
            "refused": len(found.refused),
        }

    def changed(self, row: Row) -> str:
        """The options of a row that differ from those that the default ran with: "layer=1"."""
        default = next(one for one in self.rows if one.name == DEFAULT).options
        plain = json.loads(json.dumps(row.given, default=repr))
        own = [f"{option}={value}" for option, value in plain.items() if default.get(option, row) != value]
        return ", ".join(own)

    @property
    def finding(self) -> str:
        """Whether the confirmation shows that the best combination of the search differs from the default."""
        best, split = next(row for row in self.rows if row.name == "tuned 1"), self.what["datasets"][1]["split"]
        name = self.changed(best) or "the best combination, which has the options of the default,"
        if best.reason is not None:
            return f"{name} could not run on {split}: {best.reason}"
        if best.difference is None:
            return f"{name} is the best combination found; the default could not run"
        said = verdict(best.difference)
        if best.difference.too_few:
            return f"{said} to compare {name} with the default on {split}: keep the default"
        if not best.difference.shown:
            return f"{said} between {name} and the default on {split}: keep the default"
        better = "better" if best.difference.value > 0 else "worse"
        return f"{name} is {better} than the default on {split}: gIoU {said}"


def as_json(found: Tuned) -> str:
    """The result, with the search space and every trial, as JSON."""
    refused = summed(found.search.refused)
    content = {
        **found.what,
        "trials": found.trials,
        "limit": found.limit,
        "confirm_limit": found.confirm_limit,
        "space": {option: list(domain.values) for option, domain in found.space.domains.items()},
        "left_out": found.space.left_out,
        "counts": found.counts,
        "refused": [{"count": count, "example": example} for count, example in refused.values()],
        "searched": [asdict(trial) for trial in found.search.trials],
        "confirmed": [asdict(row) for row in found.rows],
        "finding": found.finding,
    }
    return json.dumps(content, indent=1, default=repr, ensure_ascii=False) + "\n"


def tuned_table(found: Tuned) -> RenderableType:
    """The confirmation as a Rich table, with the counts of the search below."""
    from rich.console import Group
    from rich.table import Table

    what = found.what
    first, second = (entry["split"] for entry in what["datasets"])
    queries = max(row.queries for row in found.rows)
    name = f"{what['strategy']} at {what['budget']:g} on {what['model']['name'] or what['model']['source']}"
    table = Table(title=f"{name}, {what['datasets'][1]['name']} ({second}), {queries} queries", title_justify="left")
    table.add_column("", no_wrap=True)
    table.add_column("other options", overflow="fold")
    for heading in (f"gIoU on {first}", f"gIoU on {second} [95 %]", "cIoU", "tokens", "against default"):
        table.add_column(heading)
    for row in found.rows:
        options = (found.changed(row) if row.name.startswith("tuned") else "") or "–"
        calibration = "–" if row.calibration is None else f"{row.calibration:.3f}"
        if row.giou is None or row.ciou is None:
            table.add_row(row.name, options, calibration, row.reason)
            continue
        table.add_row(
            row.name,
            options,
            calibration,
            str(row.giou),
            f"{row.ciou.value:.3f}",
            f"{row.equivalent_tokens:.1f} ({row.tokens_ratio:.1%})",
            verdict(row.difference),
        )
    return Group(table, *_lines(found))


def _lines(found: Tuned) -> list[str]:
    counts = found.counts
    space = "; ".join(f"{option}: {domain}" for option, domain in found.space.domains.items())
    searched = f"searched: {space}"
    ran = (
        f"{counts['asked']} of {counts['combinations']} combinations asked for: {counts['ran']} ran, "
        f"{counts['repeated']} repeated an earlier one, {counts['refused']} refused"
    )
    refused = [f"refused {count}×, for example: {example}" for count, example in summed(found.search.refused).values()]
    return [searched, ran, *refused, found.finding]
