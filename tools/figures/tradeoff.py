"""Draw `docs/results/tradeoff-giou.png`: gIoU by budget of eight strategies, others in grey.

    python tools/figures/tradeoff.py

Every strategy keeps positions, as in the first table of the results page; bands are 95 % intervals over scenes.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from sweep_tables import common_budgets, label_of, sweep

TARGET = Path(__file__).resolve().parents[2] / "docs" / "results" / "tradeoff-giou.png"
SHOWN = ("csp+", "csp", "uniform", "fastv", "prumerge+", "divprune", "visionzip", "vscan")


def main() -> None:
    """Draw and write the figure."""
    rows = [row for row in sweep() if row["positions"] == "keep" and set(row["given"]) <= {"positions"}]
    rows = [row for row in rows if row["budget"] in common_budgets()]
    untouched = next(row["giou"][0] for row in sweep() if row["strategy"] == "none")
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    axis.axhline(untouched, color="black", linewidth=0.8, linestyle=":")
    axis.text(0.5, untouched + 0.008, "none", ha="right", fontsize=9)
    for name in dict.fromkeys(map(label_of, rows)):
        own = sorted((row for row in rows if label_of(row) == name), key=lambda row: row["budget"])
        budgets, values = [row["budget"] for row in own], [row["giou"] for row in own]
        if name not in SHOWN:
            axis.plot(budgets, [value[0] for value in values], color="0.85", linewidth=1, zorder=1)
            continue
        look = {"color": "black", "linewidth": 2.4} if name == SHOWN[0] else {}
        middle = [value[0] for value in values]
        (line,) = axis.plot(budgets, middle, marker="o", markersize=4, label=name, zorder=3, **look)
        axis.fill_between(
            budgets, [value[1] for value in values], [value[2] for value in values], color=line.get_color(), alpha=0.1
        )
    axis.set(
        xlabel="budget (share of the image tokens, averaged over layers)",
        ylabel="gIoU",
        xlim=(0.09, 0.51),
        ylim=(0, 0.9),
    )
    axis.set_xticks(sorted({row["budget"] for row in rows}))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="lower right", frameon=False)
    figure.savefig(TARGET, dpi=120)


if __name__ == "__main__":
    main()
