"""How the figures of the page on concepts look: one function for each, from the numbers that `concepts` gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Patch, Rectangle
from stages import ACTIVE, INK, PARKED

TEXT, QUERY, FAINT, NONE = "#d9d4c7", "#e69f00", "#6b7178", "#ffffff"
DEEP, ROSE = "#1d4565", "#b5597f"
WIDTH = 5.6  # inches; the page shows 403 points
STATES = {"a": "active", "p": "parked", "d": "dropped"}
EMPTY = {"facecolor": NONE, "edgecolor": FAINT, "linewidth": 0.7}
PADDING = {**EMPTY, "hatch": "////"}
FATES = {"active": {"facecolor": ACTIVE}, "parked": {"facecolor": PARKED}, "dropped": EMPTY}
LINES: dict[str, dict[str, Any]] = {
    "active": {"lw": 2.4},
    "parked": {"lw": 2.4, "ls": (0, (1, 1))},
    "dropped": {"lw": 1.2},
}
STYLE = {"svg.fonttype": "path", "font.family": "DejaVu Sans", "font.size": 10, "axes.titlesize": 10}
STYLE |= {"text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK}
STYLE |= {"figure.constrained_layout.h_pad": 0.08, "figure.constrained_layout.w_pad": 0.06}
STYLE |= {"axes.linewidth": 0.8, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}


def write(draw: Callable[[Any], Figure], data: dict[str, Any], target: Path) -> None:
    """Draw and write one figure; the same numbers give the same bytes with the same matplotlib."""
    with plt.rc_context({**STYLE, "svg.hashsalt": target.stem}):
        figure = draw(data)
        described = json.dumps(data, sort_keys=True)
        figure.savefig(target, facecolor="white", metadata={"Date": None, "Description": described})
        plt.close(figure)
    print(f"wrote {target}")


def blank(height: float, columns: float, rows: float) -> tuple[Figure, Axes]:
    """A figure for cells of size 1: x from 0 to `columns`, y downwards from 0 to `rows`."""
    figure = plt.figure(figsize=(WIDTH, height))
    axis = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    axis.set(xlim=(0, columns), ylim=(rows, 0))
    axis.axis("off")
    return figure, axis


def cell(axis: Axes, x: float, y: float, facecolor: str, text: object = "", **look: Any) -> None:
    """A square with a text in it."""
    look = {"facecolor": facecolor, "edgecolor": "none", **look}
    axis.add_patch(Rectangle((x + 0.04, y + 0.04), 0.92, 0.92, **look))
    axis.text(x + 0.5, y + 0.53, str(text), ha="center", va="center", color="white" if facecolor == ACTIVE else INK)


def legend(axis: Axes, entries: dict[str, dict[str, Any]], **where: Any) -> None:
    """Colours and what they mean, in one line or several."""
    handles = [Patch(label=label, **{"edgecolor": "none", **look}) for label, look in entries.items()]
    options = {"handlelength": 1, "handleheight": 1, "columnspacing": 1.2, "handletextpad": 0.5, "borderaxespad": 0}
    axis.legend(handles=handles, **{**options, **where})


def sequence(data: dict[str, Any]) -> Figure:
    """Two rows of a batch as cells, image tokens with their numbers; below, their grids."""
    length = len(data["valid"][0])
    figure, axis = blank(4.3, length + 2.2, 13)
    top = 0.0
    letters = {"mask_query": "m", "seg": "s", "last": "l"}
    for row, valid in enumerate(data["valid"]):
        axis.text(0, top + 1.5, f"row {row}", va="center", fontsize=9)
        where = {slot: number for number, slot in enumerate(data["slots"][row]) if slot >= 0}
        asked = {data["queries"][name][row]: letter for name, letter in letters.items()}
        for place in range(length):
            x = place + 2
            axis.text(x + 0.5, top + 0.6, place, ha="center", va="center", fontsize=8, color=FAINT)
            if not valid[place]:
                cell(axis, x, top + 1, **PADDING)
            elif place in where:
                cell(axis, x, top + 1, ACTIVE, where[place])
            else:
                cell(axis, x, top + 1, QUERY if place in asked else TEXT, asked.get(place, ""))
        for image in sorted(set(data["image"][row]) - {-1}):
            numbers = [n for n, found in enumerate(data["image"][row]) if found == image]
            first, last = (data["slots"][row][n] + 2 for n in (numbers[0], numbers[-1]))
            side = 1 + max(data["grid"][row][n][1] for n in numbers)
            left = (first + last + 1 - side) / 2
            ends, y = [first + 0.1, last + 0.9], top + 2.3
            axis.plot([ends[0], *ends, ends[1]], [y - 0.2, y, y, y - 0.2], color=INK, lw=0.8)
            axis.text(left - 0.25, top + 3.25, f"image {image}", ha="right", va="center", fontsize=9)
            for n in numbers:
                y, x = data["grid"][row][n]
                cell(axis, left + x, top + 2.75 + y, ACTIVE, n)
        top += 3.3 + max(y for y, _ in data["grid"][row]) + 1
    entries = {"image token": {"facecolor": ACTIVE}, "text": {"facecolor": TEXT}, "padding": PADDING}
    entries["query row: m mask_query, s seg, l last"] = {"facecolor": QUERY}
    legend(axis, entries, loc="lower left", ncols=2, fontsize=9)
    return figure


def stages(data: dict[str, Any]) -> Figure:
    """A cell for each token in each layer; where stages begin, their names."""
    layers, tokens = len(data["fates"]), len(data["fates"][0])
    figure, axis = blank(2.6, tokens + 9.4, layers + 3.8)
    axis.text(1.6 + tokens / 2, 0.5, "image token", ha="center", va="center")
    axis.text(0.1, 2 + layers / 2, "decoder layer", rotation=90, va="center", ha="center")
    for token in range(tokens):
        axis.text(token + 2.1, 1.5, token, ha="center", va="center", fontsize=9, color=FAINT)
    for layer, letters in enumerate(data["fates"]):
        axis.text(1.2, layer + 2.5, layer, ha="center", va="center")
        for token, letter in enumerate(letters):
            cell(axis, token + 1.6, layer + 2, **FATES[STATES[letter]])
    for name, kind, layer in data["stages"]:
        axis.plot([1.6, tokens + 9.4], [layer + 2, layer + 2], color=INK, lw=0.8)
        active = data["fates"][layer].count("a")
        axis.text(tokens + 2, layer + 2.55, f"{name}: {kind}", va="center")
        axis.text(tokens + 2, layer + 3.45, f"{active} active", va="center", color=FAINT)
    legend(axis, FATES, loc="lower left", ncols=3)
    return figure


def parked(data: dict[str, Any]) -> Figure:
    """How far the states of tokens have come at every layer; a token's line is level where its state stands still."""
    figure, axis = plt.subplots(figsize=(WIDTH, 3.5), layout="constrained")
    layers = len(next(iter(data["tracks"])))
    handles = [Line2D([], [], color=INK, label=label, **look) for label, look in LINES.items()]
    axis.legend(handles=handles, loc="upper left", handlelength=2)
    tokens = []
    for number, (life, track) in enumerate(data["tracks"].items()):
        colour = (QUERY, ACTIVE, ROSE)[number]
        for layer, letter in enumerate(life):
            look = dict(LINES[STATES[letter]])
            if letter == "p":
                look["ls"] = (number, look["ls"][1])  # dots of two tokens at one place stand side by side
            axis.plot([layer, layer + 1], track[layer : layer + 2], color=colour, solid_capstyle="butt", **look)
        told = ", then ".join(STATES[letter] for letter, _ in groupby(life))
        tokens.append(Line2D([], [], color=colour, lw=2.4, label=f"token {data['tokens'][life]}: {told}"))
    axis.set(xlim=(-0.1, layers), ylim=(-0.6, 16.5), xticks=range(layers + 1), yticks=[0, 5, 10, 15])
    axis.set_xticklabels([*range(layers), "end"])
    axis.set_xlabel("state at the entry of decoder layer")
    axis.set_ylabel("distance from the embedding")
    figure.legend(handles=tokens, loc="outside lower center", handlelength=1.2)
    return figure


def merged(data: dict[str, Any]) -> Figure:
    """Left, the content of every cell; right, which token it went into, and the mass of those that are left."""
    side = 1 + max(column for _, column in data["cells"])
    figure, axis = blank(2.95, 2 * side + 1.2, side + 1.05)
    fills = {"a": "#c9d7e3", "b": "#e4dcc3", "c": "#c8dfd3", "d": "#e8cfda"}
    right = side + 1.2
    axis.text(side / 2, 0.45, "image tokens by what they show", ha="center", va="center")
    axis.text(right + side / 2, 0.45, f"merged into {len(data['mass'])}, with masses", ha="center", va="center")
    for token, (y, x) in enumerate(data["cells"]):
        fill = fills[data["content"][token]]
        cell(axis, x, y + 1, fill, token)
        cell(axis, right + x, y + 1, fill)
    for token, into in enumerate(data["into"]):
        (y, x), (end_y, end_x) = data["cells"][token], data["cells"][into]
        if token != into:
            axis.plot([right + x + 0.5, right + end_x + 0.5], [y + 1.5, end_y + 1.5], color=INK, lw=1, alpha=0.7)
            axis.plot(right + x + 0.5, y + 1.5, "o", color=INK, markersize=3)
    for token, mass in data["mass"].items():
        y, x = data["cells"][int(token)]
        axis.add_patch(Circle((right + x + 0.5, y + 1.5), 0.36, facecolor=ACTIVE, edgecolor="white", zorder=3))
        axis.text(right + x + 0.5, y + 1.53, f"{mass:g}", ha="center", va="center", color="white", zorder=4)
    return figure


def budgets(data: dict[str, Any]) -> Figure:
    """A panel for each strategy: tokens entering the layers, and the budget as a line."""
    figure, panels = plt.subplots(2, 2, figsize=(WIDTH, 4.4), sharex=True, sharey=True, layout="constrained")
    limit = data["budget"] * data["total"]
    for panel, (name, counts) in zip(panels.flat, data["counts"].items(), strict=True):
        layers = range(len(counts))
        panel.bar(layers, counts, width=1, color=ACTIVE, edgecolor="white", linewidth=0.8)
        over = [max(count - limit, 0) for count in counts]
        under = [max(limit - count, 0) for count in counts]
        panel.bar(layers, over, bottom=limit, width=1, color=DEEP, edgecolor="white", linewidth=0.8)
        panel.bar(layers, under, bottom=counts, width=1, color=PARKED, edgecolor="white", linewidth=0.8)
        panel.axhline(limit, color=QUERY, lw=2)
        panel.set_title(f"{name}: mean {sum(counts) / len(counts):.1f}")
        panel.set_xticks([0, 3, 6, 9, 11])
        panel.set_yticks([0, 64, 128, 192, 256])
    for panel in panels[1]:
        panel.set_xlabel("decoder layer")
    figure.supylabel("image tokens entering", fontsize=10, color=INK)
    handles = [Line2D([], [], color=QUERY, lw=2, label=f"budget {data['budget']:g} N = {limit:g}")]
    handles += [Patch(color=DEEP, label="above the budget"), Patch(color=PARKED, label="below the budget")]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, handlelength=1, columnspacing=1.2)
    return figure


def positions(data: dict[str, Any]) -> Figure:
    """Tokens as cells at their rotary positions: before pruning, kept, renumbered."""
    length = len(data["image"])
    figure, axis = blank(2.75, length + 3.4, 8.3)
    fill = [ACTIVE if image else TEXT for image in data["image"]]
    axis.text(3.2, 0.4, "rotary position of each token", va="center", color=FAINT)
    rows = {"all tokens": (list(range(length)), data["all"]), "keep": data["keep"], "renumber": data["renumber"]}
    for number, (name, (tokens, places)) in enumerate(rows.items()):
        y = 1 + 2.2 * number
        axis.text(0, y + 0.5, name, va="center")
        for token, place in zip(tokens, places, strict=True):
            cell(axis, place + 3.2, y, fill[token], place)
    for y, starts, ends in ((2.1, *data["keep"]), (4.3, data["keep"][1], data["renumber"][1])):
        for start, end in zip(starts, ends, strict=True):
            axis.plot([start + 3.7, end + 3.7], [y, y + 1], color=FAINT, lw=0.9)
    legend(axis, {"image token": {"facecolor": ACTIVE}, "text": {"facecolor": TEXT}}, loc="lower left", ncols=2)
    return figure


def caches(data: dict[str, Any]) -> Figure:
    """Cached tokens per layer, after the prefill and after generating; the length that layers report is a line."""
    figure, panels = plt.subplots(1, 2, figsize=(WIDTH, 3.3), sharey=True, layout="constrained")
    layers = range(len(data["text"]))
    prompt = [text + image for text, image in zip(data["text"], data["image"], strict=True)]
    for panel, key in zip(panels, ("prefill", "generated"), strict=True):
        held, reported = data[key], data[f"{key} reported"]
        new = [total - own for total, own in zip(held, prompt, strict=True)]
        panel.bar(layers, data["text"], width=0.86, color=TEXT)
        panel.bar(layers, data["image"], bottom=data["text"], width=0.86, color=ACTIVE)
        panel.bar(layers, new, bottom=prompt, width=0.86, color=ROSE)
        for layer, total in enumerate(held):
            panel.text(layer, total + 0.5, total, ha="center", va="bottom")
        panel.stairs(reported, [layer - 0.5 for layer in (*layers, len(layers))], baseline=None, color=QUERY, lw=2)
        panel.set(xticks=layers, yticks=[0, 8, 16, 24], ylim=(0, max(data["generated"]) + 3.5))
        panel.set_xlabel("decoder layer")
    panels[0].set_title("after the prefill")
    panels[1].set_title("after generating")
    panels[0].set_ylabel("tokens in the cache")
    looks = {"text": TEXT, "image": ACTIVE, "generated": ROSE}
    handles: list[Any] = [Patch(color=colour, label=label) for label, colour in looks.items()]
    handles.append(Line2D([], [], color=QUERY, lw=2, label="reported length"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, handlelength=1, columnspacing=1.2)
    return figure
