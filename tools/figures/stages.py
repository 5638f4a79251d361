"""Draw `docs/images/stages.svg`: image tokens entering each decoder layer, from the stages that strategies declare.

python tools/figures/stages.py [OUTPUT]
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

import tokenprune as tp
from tokenprune import Shape
from tokenprune.base import equivalent_tokens
from tokenprune.dry import declared_ledger

SHAPE = Shape(layers=12, image_tokens=256)
BUDGET = 0.35
STRATEGIES = {"none": None, "fastv": BUDGET, "prumerge+": BUDGET, "csp": BUDGET}
TARGET = Path(__file__).resolve().parents[2] / "docs" / "images" / "stages.svg"
ACTIVE, PARKED, INK = "#2f6f9f", "#c9d7e3", "#33383d"


def main() -> None:
    """Draw one panel per strategy and write the picture."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET
    plt.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "stages", "font.size": 9, "text.color": INK})
    figure, panels = plt.subplots(1, len(STRATEGIES), figsize=(10, 2.7), sharey=True, layout="constrained")
    layers, total = range(SHAPE.layers), SHAPE.image_tokens
    for panel, (name, budget) in zip(panels, STRATEGIES.items(), strict=True):
        strategy = tp.strategy(name, budget=budget).bind(SHAPE)
        counts = [entry.image[0] for entry in declared_ledger(strategy, SHAPE).entries]
        waiting = [total if max(counts[layer:]) > counts[layer] else 0 for layer in layers]
        panel.bar(layers, waiting, width=1, color=PARKED, edgecolor="white", linewidth=0.8, label="parked")
        panel.bar(layers, counts, width=1, color=ACTIVE, edgecolor="white", linewidth=0.8, label="active")
        starts = [layer for layer in layers if layer == 0 or counts[layer] != counts[layer - 1]]
        for first, end in zip(starts, [*starts[1:], SHAPE.layers], strict=True):
            middle, inside = (first + end - 1) / 2, counts[first] > 0.8 * total
            height = counts[first] - 8 if inside else counts[first] + 6
            colour = "white" if inside else INK
            panel.text(middle, height, str(counts[first]), ha="center", va="top" if inside else "bottom", color=colour)
        share = equivalent_tokens(list(strategy.stages(SHAPE)), SHAPE) / total
        panel.set_title(f"{name}\nequivalent tokens {share * total:.1f} ({share:.3f} N)", fontsize=9)
        panel.set_xlabel("decoder layer")
        panel.set_xticks([0, 3, 6, 9, 11])
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("image tokens")
    panels[0].set_yticks([0, 64, 128, 192, 256])
    panels[-1].legend(loc="upper right", frameon=False, fontsize=8, handlelength=1)
    figure.savefig(target, metadata={"Date": None})
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
