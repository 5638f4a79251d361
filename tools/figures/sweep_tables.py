"""Tables of `docs/results/sweep.json`, which `stored_sweep.py` wrote: all methods, budgets and position policies."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

SWEEP = Path(__file__).resolve().parents[2] / "docs" / "results" / "sweep.json"
HEADLINE_BUDGET = 0.35
FIVE = (
    "none",
    "csp+",
    "divprune",
    "uniform",
    "fastv",
)  # no pruning, the best, a published method near it, the grid, another


def kept() -> str:
    """gIoU of every strategy at every budget with original positions; bold: the best, italic: not shown to differ."""
    return by_policy("keep")


def published() -> str:
    """The same with each strategy's own default."""
    return by_policy(None)


def by_policy(policy: str | None) -> str:
    """Strategies without other options; a policy, or each one's default."""
    rows = [
        row for row in sweep() if row["budget"] is None or set(row["given"]) <= ({"positions"} if policy else set())
    ]
    rows = [row for row in rows if row["budget"] is None or policy in (None, row["positions"])]
    return grid_table(rows, compared=policy is not None)


def settings() -> str:
    """gIoU with options that the authors fix or that are ours, and of compositions."""
    return grid_table([row for row in sweep() if set(row["given"]) - {"positions"} or "+" in row["strategy"][:-1]])


def grid_table(rows: list[dict[str, Any]], *, compared: bool = True) -> str:
    """gIoU by strategy and budget, the best at the headline budget first.

    Args:
        rows: what is shown.
        compared: whether rows of one policy, that no difference from its best is shown of, are marked.
    """
    budgets = common_budgets()
    best = {
        budget: max((row["giou"][0] for row in rows if row["budget"] == budget), default=None) for budget in budgets
    }
    lines = []
    for label in dict.fromkeys(map(label_of, rows)):
        cells = {row["budget"]: row for row in rows if label_of(row) == label}
        picked = [cells.get(budget, cells.get(None)) for budget in budgets]
        rank = (None not in cells, -(cells.get(HEADLINE_BUDGET) or cells[None])["giou"][0])
        lines.append((rank, (f"`{label}`", *(marked(row, best, compared) for row in picked))))
    return table(("strategy", *(f"{budget:g}" for budget in budgets)), [line for _, line in sorted(lines)])


def common_budgets() -> list[float]:
    """The budgets at which all strategies ran, the largest first."""
    counts = Counter(row["budget"] for row in sweep() if row["budget"] is not None)
    return sorted((budget for budget, count in counts.items() if count == max(counts.values())), reverse=True)


def marked(row: dict[str, Any] | None, best: dict[float, float | None], compared: bool) -> str:
    """gIoU; bold if it is the best of its budget, italic if it is not shown to differ from the best of its policy."""
    if row is None:
        return ""
    value, behind = f"{row['giou'][0]:.3f}", row["against_best"]
    if row["giou"][0] == best.get(row["budget"]):
        return f"**{value}**"
    return f"*{value}*" if compared and behind is not None and not behind["shown"] else value


def label_of(row: dict[str, Any]) -> str:
    """The name, with the options that were given besides positions."""
    given = ", ".join(f"{key}={value}" for key, value in row["given"].items() if key != "positions")
    return f"{row['strategy']} ({given})" if given else str(row["strategy"])


def positions() -> str:
    """gIoU of every strategy with positions kept, and what renumbering changes, at every budget."""
    rows = [
        row for row in sweep() if row["budget"] is not None and set(row["given"]) <= {"positions"} and row["positions"]
    ]
    budgets = common_budgets()
    lines = []
    for name in dict.fromkeys(row["strategy"] for row in rows):
        own = [row for row in rows if row["strategy"] == name]
        default = next(row["positions"] for row in own if not row["given"])
        cells = []
        for budget in budgets:
            held = next((row for row in own if row["budget"] == budget and row["positions"] == "keep"), None)
            moved = next((row for row in own if row["budget"] == budget and row["positions"] == "renumber"), None)
            cells.append("" if held is None else f"{held['giou'][0]:.3f}{lost(moved)}")
        lines.append((f"`{name}`", default, *cells))
    return table(("strategy", "default", *(f"{budget:g}" for budget in budgets)), lines)


def lost(moved: dict[str, Any] | None) -> str:
    """What renumbering changes; in brackets if no difference is shown."""
    if moved is None or moved["against_other_policy"] is None:
        return ""
    found = moved["against_other_policy"]
    value = f"{found['value'][0]:+.3f}"
    return f" {value}" if found["shown"] else f" ({value})"


def intervals() -> str:
    """At the headline budget, positions kept: gIoU with its interval, differences from no pruning and from the grid."""
    rows = at_headline()
    return table(
        ("strategy", "gIoU", "from `none`", "from `uniform`", "FLOPs"),
        [
            (
                f"`{label_of(row)}`",
                f"{row['giou'][0]:.3f} [{row['giou'][1]:.3f}, {row['giou'][2]:.3f}]",
                *(verdict(row[f"against_{other}"]) for other in ("none", "grid")),
                f"{row['flops_ratio']:.2f}",
            )
            for row in rows
        ],
    )


def verdict(found: dict[str, Any] | None) -> str:
    """A paired difference with its interval, or that none is shown."""
    if found is None:
        return ""
    value, low, high = found["value"]
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]" if found["shown"] else "none shown"


def at_headline() -> list[dict[str, Any]]:
    """Rows at the headline budget that keep positions, best first, after those without a budget."""
    rows = [row for row in sweep() if row["budget"] in (None, HEADLINE_BUDGET) and row["positions"] != "renumber"]
    return sorted(rows, key=lambda row: (row["budget"] is not None, -row["giou"][0]))


def five() -> str:
    """The rows of the home page, whose head names the model: gIoU with its interval, and what they cost."""
    model = json.loads(SWEEP.read_text(encoding="utf-8"))["model"]
    rows = {label_of(row): row for row in at_headline()}
    return table(
        (f"`{model}` at {HEADLINE_BUDGET:g}", "gIoU (95 % interval)", "tokens", "FLOPs"),
        [
            (
                f"`{label}`",
                "{:.3f} ({:.3f}–{:.3f})".format(*rows[label]["giou"]),
                f"{rows[label]['equivalent_tokens_ratio']:.0%}",
                f"{rows[label]['flops_ratio']:.0%}",
            )
            for label in FIVE
        ],
    )


def by_kind() -> str:
    """gIoU by kind of query and size of target at the headline budget, positions kept, and the target's tokens kept."""
    rows = at_headline()
    kinds, sizes = list(rows[0]["by_kind"]), ("small", "medium", "large")
    return table(
        ("strategy", *kinds, *sizes, "cover"),
        [
            (
                f"`{label_of(row)}`",
                *(f"{row['by_kind'][kind]:.3f}" for kind in kinds),
                *(number(row["by_size"].get(size)) for size in sizes),
                number(row["coverage"]),
            )
            for row in rows
        ],
    )


def csp_plus() -> str:
    """gIoU of `csp+` and of what its settings change, at every budget that ran, with differences from `csp+`."""
    names = {"uniform", "csp", "csp (prune_at=None)"}
    rows = [
        row for row in sweep() if row["positions"] == "keep" and (row["strategy"] == "csp+" or label_of(row) in names)
    ]
    budgets = sorted({row["budget"] for row in rows}, reverse=True)
    lines = []
    for label in dict.fromkeys(map(label_of, rows)):
        cells = {row["budget"]: row for row in rows if label_of(row) == label}
        lines.append((f"`{label}`", *(changed(cells.get(budget)) for budget in budgets)))
    return table(("strategy", *(f"{budget:g}" for budget in budgets)), lines)


def claims() -> str:
    """Paired differences of CSP from the methods that its paper compares with, as published and each at its best."""
    pairs: list[dict[str, Any]] = json.loads(SWEEP.read_text(encoding="utf-8"))["pairs"]
    budgets = sorted({pair["budget"] for pair in pairs}, reverse=True)
    lines = []
    for first, second in dict.fromkeys((pair["first"], pair["second"]) for pair in pairs):
        own = {
            pair["budget"]: pair["difference"] for pair in pairs if (pair["first"], pair["second"]) == (first, second)
        }
        lines.append((f"`{first}` against `{second}`", *(verdict(own.get(budget)) for budget in budgets)))
    return table(("", *(f"{budget:g}" for budget in budgets)), lines)


def changed(row: dict[str, Any] | None) -> str:
    """gIoU, and the difference from the strategy's default if one is shown."""
    if row is None:
        return ""
    value, found = f"{row['giou'][0]:.3f}", row["against_default"]
    return f"{value} ({found['value'][0]:+.3f})" if found and found["shown"] else value


def sweep() -> list[dict[str, Any]]:
    """Rows of `sweep.json`, which `stored_sweep.py` wrote."""
    found: list[dict[str, Any]] = json.loads(SWEEP.read_text(encoding="utf-8"))["rows"]
    return found


def number(value: float | None) -> str:
    """Three decimals, or nothing."""
    return "" if value is None else f"{value:.3f}"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
