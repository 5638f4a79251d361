"""The figure of docs/which-strategy.md: at which numbers of image tokens strategies were shown to save time.

python tools/figures/break_even.py [FILE]      docs/images/break-even.svg

The numbers are those of `tokenprune recommend --out`, stored in docs/results/; the picture carries them as JSON in the
description of its metadata.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import drawing
import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from results import recommendation
from stages import IMAGES

from tokenprune.recommendation.results import Recommendation

MEASURED = {
    "recommend-lisa-tiny": "lisa-tiny: 12 layers of width 192",
    "recommend-7b": "8 layers of 7B's size (width 4096), random weights",
}
LOOKS: dict[str, dict[str, Any]] = {
    "pays": {"marker": "o", "markerfacecolor": drawing.ACTIVE, "markeredgecolor": drawing.ACTIVE},
    "not shown": {"marker": "o", "markerfacecolor": "white", "markeredgecolor": drawing.FAINT},
    "slower": {"marker": "X", "markerfacecolor": drawing.ROSE, "markeredgecolor": drawing.ROSE},
}
WORDS = {
    "pays": "saves time",
    "not shown": "not shown: the interval holds 1",
    "slower": "costs time",
}


def shown(low: float | None, high: float | None) -> str:
    """What an interval of the ratio shows."""
    if low is None or high is None or low <= 1 <= high:
        return "not shown"
    return "pays" if high < 1 else "slower"


def points(found: Recommendation) -> dict[str, dict[str, list[Any]]]:
    """For each strategy that ran, at batch 1: the ratio and what it shows by number of image tokens."""
    made: dict[str, dict[str, list[Any]]] = {}
    for advice in found.strategies:
        for timing in found.timings:
            if timing.label == advice.label and timing.batch == 1 and timing.ratio is not None:
                cell = [round(timing.ratio, 2), shown(timing.ratio_low, timing.ratio_high)]
                made.setdefault(advice.strategy, {})[str(timing.image_tokens)] = cell
    return made


def draw(data: dict[str, Any]) -> Figure:
    """A panel for each measurement, a row for each strategy, a mark for each number of image tokens."""
    heights = [len(rows) + 2.2 for rows in data.values()]
    figure, panels = plt.subplots(
        len(data), 1, figsize=(drawing.WIDTH, 0.24 * sum(heights) + 0.5), height_ratios=heights, layout="constrained"
    )
    for panel, (name, rows) in zip(panels, data.items(), strict=True):
        sizes = sorted({int(size) for cells in rows.values() for size in cells})
        for row, cells in enumerate(rows.values()):
            panel.axhline(row, color="#e6e6e6", lw=0.8, zorder=0)
            for size, (ratio, what) in cells.items():
                x = sizes.index(int(size))
                panel.plot(x, row, linestyle="none", markersize=6.5, **LOOKS[what])
                panel.text(x + 0.09, row + 0.03, f"{ratio:.2f}", va="center", fontsize=8.5)
        panel.set(xlim=(-0.35, len(sizes) - 0.45), ylim=(len(rows) - 0.4, -0.6))
        panel.set_xticks(range(len(sizes)), sizes)
        panel.set_yticks(range(len(rows)), list(rows))
        panel.tick_params(axis="y", length=0)
        panel.set_title(MEASURED[name], loc="left")
        panel.spines["left"].set_visible(False)
    panels[-1].set_xlabel("image tokens; beside the marks: time relative to no pruning", fontsize=9)
    handles = [
        Line2D([], [], linestyle="none", markersize=6.5, label=WORDS[what], **look) for what, look in LOOKS.items()
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=3, columnspacing=1.2, handletextpad=0.3, fontsize=9
    )
    return figure


def main(target: Path = IMAGES / "break-even.svg") -> None:
    """Draw the stored measurements."""
    drawing.write(draw, {name: points(recommendation(name)) for name in MEASURED}, target)


if __name__ == "__main__":
    main(*(Path(text) for text in sys.argv[1:2]))
