"""Write the tables of README.md and of pages such as `docs/results.md` from the stored comparisons in `docs/results/`,
and the results that lisa-tiny comes with, which `tokenprune recommend` looks accuracies up in.

    python tools/figures/results.py [--check]

A table stands between `<!-- results: NAME -->` and `<!-- end -->`; NAME is a function below. With `--check` nothing is
written and a page whose table is not the stored numbers' is an error.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attention_tables import attention
from sweep_tables import (
    SWEEP,
    by_kind,
    claims,
    csp_plus,
    five,
    intervals,
    kept,
    number,
    positions,
    published,
    settings,
    table,
)

from tokenprune.evaluation.comparison.results import Comparison, Row
from tokenprune.recommendation.results import Recommendation, Timing

ROOT = Path(__file__).resolve().parents[2]
STORED = ROOT / "docs" / "results"
PAGES = (
    ROOT / "README.md",
    *(ROOT / "docs" / name for name in ("attention.md", "index.md", "results.md", "positions.md", "tuning.md")),
    ROOT / "docs" / "which-strategy.md",
    ROOT / "docs" / "methods" / "csp.md",
)
TUNED = ("csp", "fastv", "prumerge+", "divprune", "visionzip")
MARKED = re.compile(r"<!-- results: (\w+) -->\n(.*?)<!-- end -->\n", re.DOTALL)
HEADLINE_BUDGET = 0.35
BUNDLED = ROOT / "adapters" / "tokenprune_adapters" / "bundled" / "lisa_tiny" / "results.json"
KEPT = ("strategy", "options", "given", "budget", "giou", "ciou", "agreement", "equivalent_tokens_ratio")


def read(name: str) -> Comparison:
    """A stored comparison."""
    return Comparison.model_validate_json((STORED / f"{name}.json").read_text(encoding="utf-8"))


def headline() -> str:
    """The README's table: one budget, accuracy and cost."""
    found = read("headline")
    rows = [row for row in found.rows if row.budget in (None, HEADLINE_BUDGET)]
    head = ("strategy", "gIoU", "agreement", "equivalent tokens", "FLOPs", "prefill")
    return table(
        head,
        [
            (
                f"`{row.label}`",
                f"{row.giou:.3f}",
                f"{row.agreement:.3f}",
                f"{row.equivalent_tokens:.1f}",
                f"{row.flops_ratio:.2f}",
                f"{row.prefill_speedup:.2f}×",
            )
            for row in rows
        ],
    )


def ablation() -> str:
    """gIoU of CSP's choices at every budget, best mean first."""
    found = read("ablate_csp")
    budgets = budgets_of(found)
    groups: dict[str, dict[float | None, Row]] = {}
    for row in found.rows:
        if row.strategy == "csp":
            groups.setdefault(row.label, {})[row.budget] = row
    means = {label: sum(row.giou for row in rows.values()) / len(rows) for label, rows in groups.items()}
    order = sorted(groups, key=lambda label: -means[label])
    first = groups[order[0]][budgets[0]].given
    return table(
        (*first, *(f"{budget:g}" for budget in budgets), "mean"),
        [
            (
                *(f"{value}" for value in groups[label][budgets[0]].given.values()),
                *(f"{groups[label][budget].giou:.3f}" for budget in budgets),
                f"{means[label]:.3f}",
            )
            for label in order
        ],
    )


def tuned() -> str:
    """Searches of `tokenprune tune`: the default and the best combinations of every method."""
    rows = []
    for name in TUNED:
        found = read_tuning(name)
        default = next(row for row in found["confirmed"] if row["name"] == "default")
        for row in found["confirmed"][1:]:
            own = [f"{key}={value}" for key, value in row["given"].items() if default["options"].get(key) != value]
            gap = row["difference"]
            rows.append(
                (
                    f"`{name}`",
                    row["name"],
                    f"`{', '.join(own)}`" if own and row is not default else "",
                    number(row["calibration"]),
                    f"{row['giou']['value']:.3f} [{row['giou']['low']:.3f}, {row['giou']['high']:.3f}]",
                    f"{row['equivalent_tokens']:.1f} ({row['tokens_ratio']:.1%})",
                    f"{gap['value']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]" if gap and own else "",
                )
            )
    head = ("strategy", "", "other options", "gIoU on train", "gIoU on val", "tokens", "val, against default")
    return table(head, rows)


def searched() -> str:
    """Combinations of the same searches: asked for, run, repeated, refused."""
    names = ("combinations", "asked", "ran", "repeated", "refused")
    rows = [(f"`{name}`", *(str(read_tuning(name)["counts"][key]) for key in names)) for name in TUNED]
    return table(("strategy", *names), rows)


def csp_windows() -> str:
    """gIoU of CSP by its window: the layers that see all image tokens, and the layer at which it prunes."""
    trials = [trial for trial in read_tuning("csp-windows")["searched"] if trial["giou"] is not None]
    cells = {(one["options"]["scatter_at"], one["options"]["prune_at"]): one["giou"] for one in trials}
    widths = sorted({end - start for start, end in cells})
    ends = sorted({end for _, end in cells})
    rows = [(str(width), *(number(cells.get((end - width, end))) for end in ends)) for width in widths]
    return table(("layers with all tokens", *(f"prune at {end}" for end in ends)), rows)


def csp_plus_search() -> str:
    """gIoU on scenes of train, on which the settings of `csp+` were chosen."""
    found = read("tuning/csp-plus")
    rows = {label: [row for row in found.rows if row.label == label] for label in labels(found) if label != "none"}
    head = ("strategy", *(f"{budget:g}" for budget in budgets_of(found)), "mean")
    values = {label: [row.giou for row in own] for label, own in rows.items()}
    return table(
        head,
        [(f"`{label}`", *map(number, own), number(sum(own) / len(own))) for label, own in values.items()],
    )


def read_tuning(name: str) -> dict[str, Any]:
    """A stored search."""
    found: dict[str, Any] = json.loads((STORED / "tuning" / f"{name}.json").read_text(encoding="utf-8"))
    return found


def budgets_of(found: Comparison) -> list[float]:
    """The budgets of a comparison as a list."""
    return found.budget if isinstance(found.budget, list) else [found.budget]


def labels(found: Comparison) -> list[str]:
    """Strategies in the order of the comparison, each once."""
    return list(dict.fromkeys(row.label for row in found.rows))


def recommendation(name: str) -> Recommendation:
    """A stored measurement of `tokenprune recommend`."""
    return Recommendation.model_validate_json((STORED / f"{name}.json").read_text(encoding="utf-8"))


def pays_lisa_tiny(name: str = "recommend-lisa-tiny") -> str:
    """Break-even points and ratios at batch 1, and the known accuracy."""
    found = recommendation(name)
    ran = [advice for advice in found.strategies if advice.reason is None]
    sizes = sorted({timing.image_tokens for timing in found.timings})
    known = any(advice.accuracy and advice.accuracy[0].model == found.model for advice in ran)
    rows = []
    for advice in ran:
        point = advice.break_even[0]
        own = {timing.image_tokens: timing for timing in found.timings if timing.label == advice.label}
        first = "not shown" if point.image_tokens is None else str(point.image_tokens)
        beyond = f" (not shown at {', '.join(map(str, point.not_shown_at))})" if point.not_shown_at else ""
        accuracy = (f"{advice.accuracy[0].giou:.3f}" if advice.accuracy else "",) if known else ()
        rows.append((f"`{advice.strategy}`", first + beyond, *(interval(own.get(size)) for size in sizes), *accuracy))
    head = ("strategy", "pays from", *(f"{size} image tokens" for size in sizes), *(("gIoU",) if known else ()))
    return table(head, rows)


def pays_7b() -> str:
    """The same of layers of 7B's size."""
    return pays_lisa_tiny("recommend-7b")


def interval(timing: Timing | None) -> str:
    """A ratio with its interval."""
    if timing is None or timing.ratio is None or timing.ratio_low is None:
        return "–"
    return f"{timing.ratio:.2f} ({timing.ratio_low:.2f}–{timing.ratio_high:.2f})"


def bundled() -> str:
    """The sweep as a comparison, with accuracies alone: what is timed differs on every machine."""
    found = json.loads(SWEEP.read_text(encoding="utf-8"))
    budgets = sorted({row["budget"] for row in found["rows"] if row["budget"] is not None}, reverse=True)
    head = {key: found[key] for key in ("model", "dataset", "split")} | {
        "samples": found["queries"],
        "budget": budgets,
        "environment": found["environment"],
    }
    rows = [{**{key: row[key] for key in KEPT}, "giou": row["giou"][0]} for row in found["rows"]]
    lines = ",\n".join(map(json.dumps, rows))
    return json.dumps(head, indent=1).removesuffix("\n}") + f',\n "rows": [\n{lines}\n ]\n}}\n'


MADE = (
    *(headline, five, kept, published, settings, positions, intervals, by_kind, ablation),
    *(tuned, searched, csp_windows, csp_plus_search, csp_plus, claims, pays_lisa_tiny, pays_7b, attention),
)
TABLES: dict[str, Callable[[], str]] = {made.__name__: made for made in MADE}


def written(page: Path) -> str:
    """The page with its tables as they should be."""
    return MARKED.sub(
        lambda found: f"<!-- results: {found[1]} -->\n\n{TABLES[found[1]]()}\n<!-- end -->\n",
        page.read_text(encoding="utf-8"),
    )


def main() -> int:
    """Write or check all pages and the bundled results; the number of files that differ."""
    made = {page: written(page) for page in PAGES} | {BUNDLED: bundled()}
    stale = [file for file, text in made.items() if not file.is_file() or file.read_text(encoding="utf-8") != text]
    for file in stale:
        if "--check" in sys.argv:
            print(f"{file}: differs from docs/results/*.json; run python tools/figures/results.py")
        else:
            file.write_text(made[file], encoding="utf-8")
            print(f"wrote {file}")
    return len(stale) if "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
