"""Which query row, re-entry rule and clustering module are best for CSP on a model: all combinations, several budgets.

    python benchmarks/ablate_csp.py --model lisa-tiny --budgets 0.5,0.35,0.25,0.15 --limit 400 --out build/ablate-csp

writes `ablate_csp.json` (the comparison, see `tokenprune compare`) and `ablate_csp.md`: a table with a row per
combination and a column per budget, best first, and the mean effect of every choice.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from tokenprune.cli.models import load_model, quiet_loading
from tokenprune.evaluation.comparison.compare import compare
from tokenprune.evaluation.comparison.results import Comparison, Row

CHOICES = {
    "clustering": ("random", "uniform", "grid", "cls_attention", "seg_first", "kmeans"),
    "reentry": ("projected", "delta"),
    "query": ("mask_query", "seg"),
}


def main() -> None:
    """Run the ablation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="lisa-tiny")
    parser.add_argument("--vision-tower", type=Path)
    parser.add_argument("--dataset", default="shapes")
    parser.add_argument("--split", default="val")
    parser.add_argument("--budgets", default="0.5,0.35,0.25,0.15")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clustering", default=",".join(CHOICES["clustering"]))
    parser.add_argument("--out", type=Path, default=Path("build/ablate-csp"))
    given = parser.parse_args()
    quiet_loading()
    choices = {**CHOICES, "clustering": tuple(given.clustering.split(","))}
    model = load_model(given.model, vision_tower=given.vision_tower)
    found = compare(
        model,
        given.dataset,
        ["none", "blind", *texts(choices)],
        [float(budget) for budget in given.budgets.split(",")],
        given.split,
        given.limit,
        given.seed,
        timing_samples=0,
        records=0,
        progress=lambda what, done, total: print(f"\r{what} {done}/{total}", end="", file=sys.stderr, flush=True),
    ).model_copy(update={"model": given.model})
    for row in found.rows:
        if row.reason is not None:
            sys.exit(f"{row.label} did not run: {row.reason}")
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "ablate_csp.json").write_text(found.to_json() + "\n", encoding="utf-8")
    table = markdown(found, choices)
    (given.out / "ablate_csp.md").write_text(table, encoding="utf-8")
    print(f"\n{table}\nwrote {given.out}/ablate_csp.json and ablate_csp.md", file=sys.stderr)


def texts(choices: dict[str, tuple[str, ...]]) -> list[str]:
    """Every combination as a strategy with options."""
    named = [[f"{name}={value}" for value in values] for name, values in choices.items()]
    return ["csp:" + ",".join(parts) for parts in itertools.product(*named)]


def markdown(found: Comparison, choices: dict[str, tuple[str, ...]]) -> str:
    """The tables."""
    budgets = list(dict.fromkeys(row.budget for row in found.rows if row.budget is not None))
    rows = [row for row in found.rows if row.budget is not None]
    combinations: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        combinations.setdefault(tuple(str(row.given[name]) for name in choices), []).append(row)
    ranked = sorted(combinations.items(), key=lambda item: -statistics.fmean(row.giou for row in item[1]))
    floor = ", ".join(f"{row.strategy} {row.giou:.3f}" for row in found.rows if row.budget is None)
    lines = [f"CSP on {found.model}, {found.dataset} ({found.split}), {found.samples} queries. gIoU; {floor}.", ""]
    lines += _table(
        [*choices, *(f"{budget:g}" for budget in budgets), "mean"],
        [
            [*key, *(f"{row.giou:.3f}" for row in own), f"{statistics.fmean(row.giou for row in own):.3f}"]
            for key, own in ranked
        ],
    )
    lines += ["", "Mean over all other choices:", ""]
    effects = []
    for name, values in choices.items():
        for value in values:
            own = [row for row in rows if row.given[name] == value]
            means = [statistics.fmean(row.giou for row in own if row.budget == budget) for budget in budgets]
            effects.append([f"{name}={value}", *(f"{mean:.3f}" for mean in means), f"{statistics.fmean(means):.3f}"])
    lines += _table(["choice", *(f"{budget:g}" for budget in budgets), "mean"], effects)
    return "\n".join(lines) + "\n"


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *body)]


if __name__ == "__main__":
    main()
