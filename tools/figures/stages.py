"""Pictures of stages for the docs.

python tools/figures/stages.py declared [OUTPUT]           docs/images/stages.svg: image tokens entering each decoder
                                                           layer, from the stages that strategies declare
python tools/figures/stages.py methods [FOLDER [NAME …]]   docs/images/methods/*.png: what every built-in strategy keeps
                                                           of one image for one query, on lisa-tiny
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from PIL import Image

import tokenprune as tp
from tokenprune import Shape
from tokenprune.core.scheduling.plan import declared_ledger
from tokenprune.core.stage import equivalent_tokens
from tokenprune.engine.interface.compatibility import compatible
from tokenprune.evaluation.samples import SampleRecord, run_query, sample
from tokenprune.plugins import registry
from tokenprune.report import panels

SHAPE = Shape(layers=12, image_tokens=256)
BUDGET = 0.35
STRATEGIES = {"none": None, "fastv": BUDGET, "prumerge+": BUDGET, "csp": BUDGET}
IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"
ACTIVE, PARKED, INK = "#2f6f9f", "#c9d7e3", "#33383d"

MODEL = "lisa-tiny"
QUERY = 6  # of the split "val" of shapes: a relation, answered rightly without pruning
WITHOUT_BUDGET = ("none", "blind")
PRESETS = ("csp-65", "csp-70")  # csp at another budget
COMPOSED = "divprune+fastv"


def declared(target: Path = IMAGES / "stages.svg") -> None:
    """Draw one panel per strategy and write the picture."""
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


def methods(folder: Path = IMAGES / "methods", *chosen: str) -> None:
    """Write a picture for every strategy that runs on the model, and say why for those that do not."""
    folder.mkdir(parents=True, exist_ok=True)
    # in single precision the processor's rounding decides what methods choose that remove near duplicates in turn
    model = tp.load(MODEL).double()
    built_in = [name for name, entry in registry.strategies().items() if entry.distribution == "tokenprune-vlm"]
    for name in chosen or [*(name for name in built_in if name not in PRESETS), COMPOSED]:
        strategy = tp.strategy(name, budget=None if name in WITHOUT_BUDGET else BUDGET)
        answer = compatible(strategy, model)
        if not answer:
            print(f"{name}: {answer.reason}")
            continue
        record = run_query(model, *sample("shapes", "val", QUERY), strategy=strategy)
        target = folder / f"{name.replace('+', '-plus' if name.endswith('+') else '-')}.png"
        size = write(method_figure(record), target)
        counts = ", ".join(f"{stage.name} {len(stage.kept[0])}" for stage in record.outcomes[0].trace.stages)
        print(f"wrote {target} ({size // 1000} kB): {record.query!r}, IoU {record.outcomes[0].iou:.2f}; {counts}")


def method_figure(record: SampleRecord) -> plt.Figure:
    """The image with its target, the tokens of every stage, and the mask that came out, side by side."""
    (outcome,) = record.outcomes
    stages = list(outcome.trace.stages)
    if not stages or stages[0].layer > 0:
        stages.insert(0, None)
    figure, axes = plt.subplots(1, 2 + len(stages), figsize=(1.7 * (2 + len(stages)), 2.1), layout="constrained")
    show(axes[0], panels.with_mask(record.image, record.target, panels.GREEN), "\ntarget")
    for axis, stage in zip(axes[1:], stages, strict=False):
        seen = panels.with_tokens(record.image, outcome.trace, stage, outcome.row, record.box)
        title = f"all\nfrom layer 0: {int(outcome.trace.exists.sum())}"
        if stage is not None:
            title = f"{stage.name}\nfrom layer {stage.layer}: {len(stage.kept[outcome.row])}"
            places = panels.merged_places(outcome.trace, stage, outcome.row, record.box)
            axis.scatter(*places.T, s=7, color=panels.ORANGE, edgecolors="black", linewidths=0.3)
        show(axis, seen, title)
    show(axes[-1], panels.with_mask(record.image, outcome.mask), f"\nmask, IoU {outcome.iou:.2f}")
    return figure


def show(axis: Axes, panel: panels.RGB, title: str) -> None:
    """One panel without ticks."""
    axis.imshow(panel.clip(0, 1), interpolation="antialiased")
    axis.set_title(title, fontsize=7.5)
    axis.set(xticks=[], yticks=[])


def write(figure: plt.Figure, target: Path) -> int:
    """Write a figure as PNG of 160 colours; gives its size in bytes."""
    memory = io.BytesIO()
    figure.savefig(memory, dpi=110, facecolor="white")
    plt.close(figure)
    Image.open(memory).convert("RGB").quantize(160, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
        target, optimize=True
    )
    return target.stat().st_size


if __name__ == "__main__":
    KINDS = {"declared": declared, "methods": methods}
    if sys.argv[1:2] not in ([kind] for kind in KINDS):
        raise SystemExit(__doc__)
    where = [Path(text) for text in sys.argv[2:3]]
    KINDS[sys.argv[1]](*where, *sys.argv[3:])
