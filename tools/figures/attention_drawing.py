"""How the figures of the page on attention look, from the measurements that `attention` stored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import drawing
import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator
from stages import ACTIVE, INK, PARKED

MAPS = 12  # layers whose maps are shown, at most
PARTS = {
    "first": ("the first token", drawing.QUERY),
    "before": ("text before the image", "#b9b2a0"),
    "image": ("image tokens", ACTIVE),
    "behind": ("text behind it", drawing.TEXT),
}
NAMES = (
    "share of the mask query's\nattention",
    "attention on the target,\ntimes an even share",
    "AUC: target cells\nagainst others",
    "share of the image's\nattention",
)
Curve = tuple[str, str, str, dict[str, Any]]  # row, measure, label, look
TARGET: tuple[Curve, ...] = (
    ("mask_query", "target", "mask query", {"color": ACTIVE, "lw": 2.2}),
    ("last", "target", "last token", {"color": drawing.ROSE, "lw": 1.4}),
    ("text", "target", "text behind the image", {"color": INK, "lw": 1.4, "ls": (0, (1, 1))}),
)
FOUND: tuple[Curve, ...] = (
    ("mask_query", "auc_best_head", "best head", {"color": drawing.DEEP, "lw": 1.4}),
    ("mask_query", "auc", "mean of the heads", {"color": ACTIVE, "lw": 2.2}),
    ("mask_query", "auc_other_queries", "other queries, same picture", {"color": drawing.QUERY, "lw": 1.4}),
    ("mask_query", "auc_other_scenes", "other pictures", {"color": drawing.FAINT, "lw": 1.4, "ls": (0, (1, 1))}),
)
SPREAD: tuple[Curve, ...] = (
    ("mask_query", "top_tenth", "on the top tenth (even: 0.1)", {"color": ACTIVE, "lw": 2.2}),
    ("mask_query", "last_quarter", "on the last quarter (even: 0.25)", {"color": drawing.ROSE, "lw": 1.4}),
)
HEAT = LinearSegmentedColormap.from_list("heat", ["#ffffff", PARKED, ACTIVE, drawing.DEEP])


def write(found: dict[str, dict[str, Any]], folder: Path) -> None:
    """Draw measurements side by side into `attention.svg`, and the maps of their examples into `attention-maps.svg`."""
    drawing.write(curves, {name: numbers(one) for name, one in found.items()}, folder / "attention.svg")
    maps = {name: {"model": one["model"], **one["example"]} for name, one in found.items()}
    drawing.write(heat_maps, maps, folder / "attention-maps.svg")


def numbers(found: dict[str, Any]) -> dict[str, Any]:
    """What the figure of curves shows of a measurement: by row and measure a list over layers."""
    shown = [("mask_query", part) for part in PARTS] + [curve[:2] for curve in (*TARGET, *FOUND, *SPREAD)]
    made: dict[str, Any] = {"model": found["model"], "layers": found["layers"]}
    for row, measure in shown:
        if measure in found["rows"][row]:
            made.setdefault(row, {})[measure] = found["rows"][row][measure]
    return made


def curves(data: dict[str, Any]) -> Figure:
    """A column for each model; in rows what attention goes to, how much of it to the target, whether it tells the
    target from the rest, and how it is spread."""
    size = (drawing.WIDTH, 8.4)
    figure, panels = plt.subplots(4, len(data), figsize=size, sharey="row", squeeze=False, layout="constrained")
    for column, found in zip(panels.T, data.values(), strict=True):
        layers = range(found["layers"])
        parts = [[value for value, _, _ in found["mask_query"][part]] for part in PARTS]
        looks = {"labels": [label for label, _ in PARTS.values()], "colors": [colour for _, colour in PARTS.values()]}
        column[0].stackplot(layers, parts, **looks)
        for panel, shown in zip(column[1:], (TARGET, FOUND, SPREAD), strict=True):
            lines(panel, found, shown)
        column[0].set(title=found["model"], ylim=(0, 1))
        column[1].set_yscale("log")
        column[1].minorticks_off()
        column[1].yaxis.set_major_locator(FixedLocator([0.1, 0.3, 1, 3, 10, 30, 100]))
        column[1].yaxis.set_major_formatter("{x:g}")
        column[1].axhline(1, color=drawing.FAINT, lw=0.8, zorder=0)
        column[2].axhline(0.5, color=drawing.FAINT, lw=0.8, zorder=0)
        column[3].set(xlabel="decoder layer", ylim=(0, 1))
        for panel in column:
            panel.set(xlim=(0, found["layers"] - 1), xticks=range(0, found["layers"], max(found["layers"] // 6, 1)))
    for panel, name in zip(panels[:, 0], NAMES, strict=True):
        panel.set_ylabel(name, fontsize=9)
    for panel in panels[:, -1]:
        panel.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8, handlelength=1.3, borderaxespad=0.2)
    return figure


def lines(panel: Axes, found: dict[str, Any], shown: Sequence[Curve]) -> None:
    """Curves over layers, each with its interval."""
    for row, measure, label, look in shown:
        if measure in found[row]:
            value, low, high = np.array(found[row][measure]).T
            panel.plot(range(len(value)), value, label=label, **look)
            panel.fill_between(range(len(value)), low, high, color=look["color"], alpha=0.15, lw=0)


def heat_maps(data: dict[str, Any]) -> Figure:
    """For each model the maps of one query by layer, each relative to its largest cell, and the target's outline."""
    across = {name: max(1, round(6 * 16 / max(16, found["grid"][1]))) for name, found in data.items()}
    heights = []
    for name, found in data.items():
        rows, columns = found["grid"]
        down = -(-min(MAPS, len(found["maps"])) // across[name])
        heights.append(down * (drawing.WIDTH / across[name] * rows / columns + 0.22) + 0.4)
    figure = plt.figure(figsize=(drawing.WIDTH, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(data), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, (name, found) in zip(parts, data.items(), strict=True):
        count = len(found["maps"])
        layers = np.linspace(0, count - 1, min(MAPS, count)).round().astype(int)
        part.suptitle(f"{found['model']}: “{found['query']}”", fontsize=10, color=INK)
        panels = part.subplots(-(-len(layers) // across[name]), across[name], squeeze=False).flat
        for panel in panels:
            panel.axis("off")
        for panel, layer in zip(part.axes, layers, strict=False):
            heat = np.array(found["maps"][layer]).reshape(found["grid"])
            panel.imshow(heat, cmap=HEAT, vmin=0, vmax=100, interpolation="nearest")
            panel.set_title(f"layer {layer}", fontsize=8, pad=2)
            outline(panel, found["target"], found["grid"])
    return figure


def outline(panel: Axes, cells: Sequence[int], grid: Sequence[int]) -> None:
    """A line between the target's cells and the others, and a frame around the grid."""
    rows, columns = grid
    inside = np.zeros((rows + 2, columns + 2), dtype=bool)
    inside[1:-1, 1:-1].flat[list(cells)] = True
    look: dict[str, Any] = {"lw": 1.4, "solid_capstyle": "projecting", "clip_on": False}
    for y, x in np.argwhere(inside[:-1] != inside[1:]):
        panel.plot([x - 1.5, x - 0.5], [y - 0.5, y - 0.5], color=drawing.QUERY, **look)
    for y, x in np.argwhere(inside[:, :-1] != inside[:, 1:]):
        panel.plot([x - 0.5, x - 0.5], [y - 1.5, y - 0.5], color=drawing.QUERY, **look)
    frame = Rectangle((-0.5, -0.5), columns, rows, facecolor="none", edgecolor=drawing.FAINT, lw=0.6, clip_on=False)
    panel.add_patch(frame)
